"""`llm-vtrans verify DIR`: one line per check, a non-zero status if one fails."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging as transformers_logging

from llm_vtrans.commands.command import Parser
from llm_vtrans.errors import UserError
from llm_vtrans.record.verification import CHECKS, Subject
from llm_vtrans.record.verification import verify as run_checks


def verify(arguments: list[str]) -> None:
    """Checks a checkpoint against its manifest.

    Args:
        arguments: the command line after the command's name.

    Raises:
        UserError: a check failed; every finding was printed before.
    """
    args = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    skipped = set(args.skip)
    failed = 0
    for finding in run_checks(
        Subject.open(args.folder, args.data), tuple(n for n in CHECKS if n not in skipped)
    ):
        word = "FAILED" if finding.is_failure else "-" if finding.is_skipped else "ok"
        failed += finding.is_failure
        print(f"{word:6}  {finding.check:10}  {finding.text}", flush=True)
    if failed:
        raise UserError(
            f"{args.folder}: {failed} finding(s): do not use this checkpoint, fetch or make it anew"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(prog="llm-vtrans verify", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a pruned checkpoint")
    parser.add_argument("--data", help="where the run's text lies now, if not where it lay")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=tuple(CHECKS), help="checks to leave out"
    )
    return parser.parse_args(arguments)
