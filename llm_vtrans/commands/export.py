"""`llm-vtrans export --from RUN --sparsity 0.4 --output OUT`: another size, no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from llm_vtrans.arguments import CALL_FIELDS, LIMITS, VARIANTS, PruneArguments
from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError
from llm_vtrans.prune import prune
from llm_vtrans.record.output_folder import MANIFEST_FILE
from llm_vtrans.report.record import RunRecord


def export(arguments: list[str]) -> None:
    """Runs the main job with an earlier run's settings and masks.

    Args:
        arguments: the command line after the command's name; options of `prune` win over the
            settings of the earlier run, and any budget takes the place of all that it had.

    Raises:
        UserError: no such run, one that trained its weights, no budget, or anything that `prune`
            refuses.
    """
    more = "Other options of prune, such as --layout or --overwrite, win over the run's own."
    parser = Parser(prog="llm-vtrans export", description=__doc__, epilog=more, allow_abbrev=False)
    parser.add_argument("--from", required=True, type=Path, dest="run", help="result of prune")
    parser.add_argument("--output", required=True, help="folder of the new result")
    for name in LIMITS:
        names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(*names, help="as of prune: see `llm-vtrans prune --help`")
    args, others = parser.parse_known_args(arguments)
    budget = [f"--{name}={value}" for name in LIMITS if (value := getattr(args, name))]
    if not budget:
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in LIMITS)
        raise UserError(f"export needs a budget: give {flags}")
    prune([*flags_of(args.run, bool(args.latency_ms)), *budget, "--output", args.output, *others])


def flags_of(run: Path, is_timed: bool = False) -> Sequence[str]:
    """The settings of a run as flags, without its budgets and with its masks for a training.

    Args:
        run: result of prune.
        is_timed: whether the new budget is one of time, too.

    Raises:
        UserError: no such run, or one that trained its weights.
    """
    settings = RunRecord.read(run).manifest.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{run / MANIFEST_FILE}: has no settings; name a folder that prune wrote")
    if (variant := settings.get("variant", VARIANTS[0])) != VARIANTS[0]:
        raise UserError(
            f"--from {run}: --variant {variant} trained its weights for one size; prune the dense "
            "model again for another"
        )
    left_out = {
        *CALL_FIELDS, *LIMITS, *(() if is_timed else ("latency_shape",)),
        "masks", "tune_share", "recover", "recover_steps",
    }  # fmt: skip
    names = [f.name for f in fields(PruneArguments) if f.name not in left_out]
    # One word each, so that no value can be taken for another flag.
    flags = [f"--{name}={settings[name]}" for name in names if settings.get(name) is not None]
    return [*flags, "--masks", str(run), "--tune_share", "0"]
