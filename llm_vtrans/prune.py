"""The main job: load, calibrate, train VIB masks, allocate, export, score.

Runs as `accelerate launch llm_vtrans/prune.py` and as `llm-vtrans prune`.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # as a script this folder comes first; the package must be found instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.commands.command import is_rank_zero, run_command
from llm_vtrans.job import Job
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.preparation.family_of_sizes import runs_of
from llm_vtrans.record.output_folder import exclusive
from llm_vtrans.record.recording import finished_manifest, result_line
from llm_vtrans.record.reporting import Reporter
from llm_vtrans.tasks.finetuning import finetune_first
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.run_state import remove_state


def prune(arguments: list[str], kind: type[Job] = Job) -> None:
    """Runs the main job.

    Args:
        arguments: the command line without the program's name.
        kind: of job; comparisons bring some that lack a part.

    Raises:
        UserError: something the user can correct.
        Preempted: a signal asked the run to go.
    """
    args = parse(arguments)
    with Preemption() as preemption, ExitStack() as locks:
        locks.enter_context(sole_writer(args.output_folder()))
        if args.finetune_first:
            if (with_dense := finetune_first(args)) is None:
                return
            args = with_dense
        runs = runs_of(args)
        if args.budgets is not None:
            for run in runs:
                locks.enter_context(sole_writer(run.output_folder()))
        jobs = list(filter(None, [_prepared(run, preemption, kind) for run in runs]))
        while jobs and not args.dry_run:
            _run(job := jobs.pop(0))
            if jobs:  # until all is done the ranks stay together
                for tracker in job.accelerator.trackers:
                    tracker.finish()
            else:
                job.accelerator.end_training()


def _prepared(args: PruneArguments, preemption: Preemption, kind: type[Job]) -> Job | None:
    """A run that is still to be done, checked and told."""
    if args.resume and (manifest := finished_manifest(args)) is not None:
        _tell_finished(args, manifest)
        return None
    job = kind.prepare(args, preemption)
    job.show_plan()
    return job


def _run(job: Job) -> None:
    job.load()
    job.search()
    job.allocate()
    job.tune()
    job.export()
    job.summarise()


def sole_writer(folder: Path) -> AbstractContextManager[None]:
    """The lock on the output folder, which rank zero holds for all."""
    return exclusive(folder) if is_rank_zero() else nullcontext()


def _tell_finished(args: PruneArguments, manifest: dict[str, Any]) -> None:
    folder = args.output_folder()
    if is_rank_zero():
        remove_state(folder)  # it may have been killed while it did so
    if args.json and is_rank_zero():
        print(result_line(folder, manifest), flush=True)
    else:
        Reporter(is_rank_zero(), args.quiet).say(f"{folder}: is finished already")


if __name__ == "__main__":
    sys.exit(run_command(prune, sys.argv[1:]))
