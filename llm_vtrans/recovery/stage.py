"""RECOVER: the exported network learns from the dense one, and its shards are written anew.

The stage starts from the exported folder alone, which is still a temporary one, so a run that
was killed in it exports and recovers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.distributed.zero3 import configure, gathered, is_partitioned
from llm_vtrans.errors import UserError
from llm_vtrans.export.shard_writer import ShardWriter
from llm_vtrans.families.base import Norm, head_of
from llm_vtrans.loading.checkpoint import Checkpoint, TensorInfo
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import Source
from llm_vtrans.masking.attachment import LINEAR_HEADS
from llm_vtrans.recovery.methods import Recovery, recovery_for
from llm_vtrans.recovery.training import RecoveryRun, settings_of
from llm_vtrans.training.loop import Progress

if TYPE_CHECKING:
    from llm_vtrans.job import Job

EXPORTED = "exported"  # scores before recovery
FOLDER = ".recovered"  # inside the exported folder, until the new shards are whole


def check_recovery(args: PruneArguments, accelerator: Accelerator) -> None:
    """Whether the recovery that was asked for can run in this launch.

    Raises:
        UserError: a library is missing, or it cannot train in this dtype or on slices.
    """
    if not args.recovers:
        return
    recovery = recovery_for(args.recover)
    recovery.check()
    if is_partitioned(accelerator) and not recovery.RUNS_SLICED:
        raise UserError(
            f"--recover {args.recover} under ZeRO-3: it changes whole weights, which lie in slices "
            "there; take --recover lora, or launch without DeepSpeed"
        )
    if args.dtype == "float16" and args.recover == "full":
        raise UserError(
            "--dtype float16: gradients of the weights that --recover full trains would "
            "underflow; take bfloat16 or float32"
        )


def check_recoverable(args: PruneArguments, source: Source) -> None:
    """Whether the recovery that was asked for knows networks of this kind.

    Raises:
        UserError: it does not.
    """
    if not args.recovers or recovery_for(args.recover).IS_GENERAL:
        return
    is_known = head_of(source.config) in LINEAR_HEADS and source.architecture.norm is Norm.RMS
    if not is_known:
        raise UserError(
            f"--recover {args.recover}: knows causal language models with RMSNorm, not this "
            f"{source.config.model_type}; take --recover lora or full"
        )


def recover_checkpoint(job: Job, folder: Path, hashes: dict[str, str]) -> dict[str, str]:
    """Recovers what was exported into a folder and replaces its shards; called on every rank.

    Args:
        job: a run after its export; its own model is gone.
        folder: the exported checkpoint, which every rank can read.
        hashes: SHA-256 of its shards, on rank zero.

    Returns:
        The new ones; shapes, dtypes and layout are those of before.

    Raises:
        UserError: the training diverged, or there is too little data.
        Preempted: a signal asked the run to go.
    """
    recovery, is_main = recovery_for(job.args.recover), job.accelerator.is_main_process
    with job.reporter.phase("recover"):
        job.score(folder, EXPORTED)
        job.accelerator.free_memory()
        stored = Checkpoint.open(folder).tensors
        dense, pruned = _networks(job, recovery, folder, stored)
        recovery.recover(dense, pruned, job.pruning(), job.data.train, _run(job))
        del dense
        job.accelerator.wait_for_everyone()  # all have read what rank zero replaces now
        return rewrite(folder, stored, pruned, hashes, job.args.shard_bytes(), is_main)


def _networks(
    job: Job, recovery: Recovery, folder: Path, stored: Mapping[str, TensorInfo]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student in dtypes in which neither loses a digit."""
    dtype = torch.float32 if recovery.IS_FLOAT32 else job.dtype
    for other in {info.dtype for info in stored.values()}:
        dtype = torch.promote_types(dtype, other)
    configure(job.accelerator, dtype, job.args.batch_size)
    # DeepSpeed holds both in one dtype; else the teacher need not be wider than what computes.
    teacher = dtype if is_partitioned(job.accelerator) else job.dtype
    dense = load_model(job.source, teacher, job.accelerator.device, form=job.args.load_in)
    pruned = job.source.auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return dense, pruned.requires_grad_(False).to(job.accelerator.device)


def _run(job: Job) -> RecoveryRun:
    first = job.settings.num_steps
    sparsity = job.problem.sparsity(job.plan.shape)

    def report(progress: Progress) -> None:
        metrics = {**progress.metrics, "sparsity": sparsity, "target": sparsity}
        job.report(replace(progress, step=first + progress.step, metrics=metrics))

    return RecoveryRun(
        job.accelerator, settings_of(job.settings, job.recovery_steps), job.dtype,
        job.args.gradient_checkpointing, report, job.reporter.say, job.preemption,
    )  # fmt: skip


def rewrite(
    folder: Path,
    stored: Mapping[str, TensorInfo],
    model: nn.Module,
    hashes: Mapping[str, str],
    shard_size: int,
    is_main: bool,
) -> dict[str, str]:
    """Puts a model's weights in the place of the stored ones; called on every rank.

    Args:
        folder: the checkpoint, into which ranks other than zero no longer look.
        stored: its tensors.
        model: of the same names and shapes.
        hashes: SHA-256 of the stored shards and their index, by name; on rank zero.
        shard_size: most bytes in a file.
        is_main: whether this is rank zero, which alone writes.

    Returns:
        The new ones, on rank zero.
    """
    specs = {name: (info.shape, info.dtype) for name, info in stored.items()}
    temporary = folder / FOLDER
    if is_main:
        temporary.mkdir()
        writer = ShardWriter(temporary, specs, shard_size)
    for name, (_, dtype) in specs.items():
        parameter = model.get_parameter(name)
        with gathered([parameter]):
            if is_main:
                writer.write(name, parameter.detach().to(dtype).contiguous())
    if not is_main:
        return {}
    written = writer.close()
    for name in hashes:
        (folder / name).unlink()
    for name in written:
        (temporary / name).replace(folder / name)
    temporary.rmdir()
    return written
