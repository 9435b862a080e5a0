"""The main job: load, calibrate, train VIB masks, allocate, export, score.

Runs as `accelerate launch llm_vtrans/prune.py` and as `llm-vtrans prune`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # as a script this folder comes first; the package must be found instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm_vtrans.arguments import parse
from llm_vtrans.command import run_command
from llm_vtrans.job import Job, is_finished
from llm_vtrans.preemption import Preemption


def prune(arguments: list[str]) -> None:
    """Runs the main job.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: something the user can correct.
        Preempted: a signal asked the run to go.
    """
    args = parse(arguments)
    if args.resume and is_finished(args):
        print(f"{args.output_folder()}: is finished already", flush=True)
        return
    with Preemption() as preemption:
        job = Job.prepare(args, preemption)
        job.show_plan()
        if args.dry_run:
            return
        job.load()
        job.train()
        job.allocate()
        job.export()
        job.summarise()


if __name__ == "__main__":
    sys.exit(run_command(prune, sys.argv[1:]))
