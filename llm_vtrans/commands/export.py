"""`llm-vtrans export --from RUN --sparsity 0.4 --output OUT`: another size, no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from llm_vtrans.arguments import BUDGETS, CALL_FIELDS, PruneArguments
from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError
from llm_vtrans.prune import prune
from llm_vtrans.record.output_folder import MANIFEST_FILE
from llm_vtrans.report.record import RunRecord


def export(arguments: list[str]) -> None:
    """Runs the main job with an earlier run's settings and masks.

    Args:
        arguments: the command line after the command's name; options of `prune` win over the
            settings of the earlier run.

    Raises:
        UserError: no such run, no budget, or anything that `prune` refuses.
    """
    parser = Parser(prog="llm-vtrans export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--from", required=True, type=Path, dest="run", help="result of prune")
    parser.add_argument("--output", required=True, help="folder of the new result")
    for name in BUDGETS:
        parser.add_argument(f"--{name}", help="as of prune: see `llm-vtrans prune --help`")
    args, others = parser.parse_known_args(arguments)
    budget = [f for n in BUDGETS if (v := getattr(args, n)) for f in (f"--{n}", v)]
    if not budget:
        raise UserError(f"export needs a budget: give --{' or --'.join(BUDGETS)}")
    prune([*flags_of(args.run), *budget, "--output", args.output, *others])


def flags_of(run: Path) -> Sequence[str]:
    """The settings of a run as flags, with its masks in place of training."""
    settings = RunRecord.read(run).manifest.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{run / MANIFEST_FILE}: has no settings; name a folder that prune wrote")
    left_out = {*CALL_FIELDS, *BUDGETS, "masks", "tune_share", "recover", "recover_steps"}
    names = [f.name for f in fields(PruneArguments) if f.name not in left_out]
    # One word each, so that no value can be taken for another flag.
    flags = [f"--{name}={settings[name]}" for name in names if settings.get(name) is not None]
    return [*flags, "--masks", str(run), "--tune_share", "0"]
