"""The main job: load, calibrate, train VIB masks, allocate, export, score.

Runs as `accelerate launch llm_vtrans/prune.py` and as `llm-vtrans prune`.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

if not __package__:  # as a script this folder comes first; the package must be found instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm_vtrans.arguments import parse
from llm_vtrans.command import run_command
from llm_vtrans.job import Job
from llm_vtrans.output_folder import exclusive
from llm_vtrans.tasks.finetuning import finetune_first


def prune(arguments: list[str]) -> None:
    """Runs the main job.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: something the user can correct.
    """
    args = parse(arguments)
    with sole_writer(args.output_folder()):
        if args.finetune_first:
            args = finetune_first(args)
        job = Job.prepare(args)
        job.show_plan()
        if args.dry_run:
            return
        job.load()
        job.search()
        job.allocate()
        job.tune()
        job.export()
        job.summarise()


def sole_writer(folder: Path) -> AbstractContextManager[None]:
    """The lock on the output folder, which rank zero holds for all."""
    return exclusive(folder) if os.environ.get("RANK", "0") == "0" else nullcontext()


if __name__ == "__main__":
    sys.exit(run_command(prune, sys.argv[1:]))
