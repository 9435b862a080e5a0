"""WRITE: the pruned checkpoint, recovered if asked for, scored, and its record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.record.masks_file import plan_tensors, write_found
from llm_vtrans.record.recording import write_record
from llm_vtrans.record.reporting import METRICS_FILE
from llm_vtrans.recovery.stage import recover_checkpoint
from llm_vtrans.training.run_state import STATE_FOLDER, remove_state
from llm_vtrans.training.trained_weights import stored_weights

if TYPE_CHECKING:
    from llm_vtrans.job import Job


def write_result(job: Job) -> None:
    """Writes the pruned checkpoint and its record on rank zero; other ranks wait.

    The job's own network is gone afterwards.
    """
    is_main, hashes = job.accelerator.is_main_process, {}
    with job.output if is_main else nullcontext(Path()) as folder:
        with _pruning(job) if is_main else nullcontext() as pruning:
            del job.masked, job.distillation  # what is written is cut from files
            job.accelerator.free_memory()
            if pruning is not None:
                hashes = _write_weights(job, folder, pruning)
        written = Path(agreed(str(folder)))
        if job.args.recovers:
            hashes = recover_checkpoint(job, written, hashes)
            job.accelerator.free_memory()
        job.score(written, "pruned")
        if is_main:
            metrics = job.output.path / STATE_FOLDER / METRICS_FILE
            job.manifest = write_record(job, folder, hashes, metrics)
    if is_main:
        remove_state(job.output.path)
    job.accelerator.wait_for_everyone()


def _write_weights(job: Job, folder: Path, pruning: Pruning) -> dict[str, str]:
    source = job.source
    with job.reporter.phase("export"):
        hashes = export_model(
            pruning, source.family, source.config, job.problem.is_uniform, folder,
            job.args.shard_bytes(),
        )  # fmt: skip
        found = {**job.masks.state_dict(), **plan_tensors(job.plan), **job.rotation_record()}
        write_found(folder, found, job.tuning, source.checkpoint.sha256)
    return hashes


@contextmanager
def _pruning(job: Job) -> Iterator[Pruning]:
    """The plan bound to the weights it prunes, frozen or trained."""
    args, architecture, rotation = job.args, job.architecture, job.rotation
    dtype = None if args.export_dtype == "auto" else getattr(torch, args.export_dtype)
    pruning = replace(job.pruning(), dtype=dtype, device=job.accelerator.device)
    if not args.trains_weights:
        yield pruning
        return
    # Trained weights are stored rotated and in float32.
    basis = job.tuning.basis(None if rotation is None else torch.eye(len(rotation)))
    dense, folder = job.source.checkpoint, job.output.path / STATE_FOLDER
    dtype = dtype or dense.tensors[architecture.embedding.name].dtype
    with stored_weights(
        job.masked.model, architecture, dense, folder, args.shard_bytes()
    ) as trained:
        yield replace(pruning, source=trained, basis=basis, dtype=dtype)
