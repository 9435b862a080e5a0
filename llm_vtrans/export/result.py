"""WRITE: the pruned checkpoint, recovered if asked for, scored, and its record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.record.manifest import plan_tensors, tuning_tensors, write_masks
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
        write_masks(
            folder,
            {
                **job.masks.state_dict(),
                **plan_tensors(job.plan),
                **job.rotation_record(),
                **tuning_tensors(job.tuning),
            },
            source.checkpoint.sha256,
        )
    return hashes


@contextmanager
def _pruning(job: Job) -> Iterator[Pruning]:
    """The plan bound to the weights it prunes, frozen or trained."""
    args, architecture, rotation = job.args, job.architecture, job.rotation
    dense = job.source.checkpoint
    dtype = None if args.export_dtype == "auto" else getattr(torch, args.export_dtype)
    factors, device = job.tuning.factors(), job.accelerator.device
    if not args.trains_weights:
        basis = job.tuning.basis(rotation)
        yield Pruning(dense, architecture, job.plan, basis, dtype, factors, device)
        return
    # Trained weights are stored rotated and in float32.
    basis = job.tuning.basis(None if rotation is None else torch.eye(len(rotation)))
    dtype = dtype or dense.tensors[architecture.embedding.name].dtype
    folder = job.output.path / STATE_FOLDER
    with stored_weights(
        job.masked.model, architecture, dense, folder, args.shard_bytes()
    ) as trained:
        yield Pruning(trained, architecture, job.plan, basis, dtype, factors, device)
