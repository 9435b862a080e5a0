"""`--batch-size auto`: as many of a step's sequences at once as fit into memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import is_offloaded, is_partitioned
from llm_vtrans.loading.source import Source
from llm_vtrans.preparation.planning import compute_dtype
from llm_vtrans.preparation.resources import (
    CPU_PROCESS_BYTES,
    GPU_PROCESS_BYTES,
    MARGIN,
    Workload,
    estimate_memory,
    host_memory,
)


def split_step(
    args: PruneArguments, source: Source, seq_len: int, accelerator: Accelerator
) -> PruneArguments:
    """The options with the same step in the fewest micro-batches, by what `plan` estimates.

    A step keeps its sequences on every device. Masks are drawn once a micro-batch, so another split
    is another draw, as another seed would be. Where not even one sequence fits by the estimate, the
    run tries with one.

    Args:
        args: `filled` ones.
        source: the dense checkpoint.
        seq_len: tokens in a sequence.
        accelerator: ranks and device.
    """
    num = args.batch_size * args.gradient_accumulation
    limit = MARGIN * _memory(accelerator.device)

    def fits(batch_size: int) -> bool:
        return _train_bytes(args, batch_size, source, seq_len, accelerator) <= limit

    sizes = [size for size in range(num, 0, -1) if num % size == 0]
    own = next((size for size in sizes if fits(size)), 1)
    size = min(gather_object([own]))
    return replace(args, batch_size=size, gradient_accumulation=num // size)


def has_room(args: PruneArguments, source: Source, seq_len: int, accelerator: Accelerator) -> bool:
    """Whether a second network fits into memory beside the one that is trained, by that estimate.

    Args:
        args: with a batch size.
        source: the dense checkpoint.
        seq_len: tokens in a sequence.
        accelerator: ranks and device.
    """
    dtype = compute_dtype(args.dtype, accelerator.device)
    second = source.architecture.num_parameters * dtype.itemsize
    train = _train_bytes(args, args.batch_size, source, seq_len, accelerator)
    return agreed(train + second <= MARGIN * _memory(accelerator.device))


def _train_bytes(
    args: PruneArguments, batch_size: int, source: Source, seq_len: int, accelerator: Accelerator
) -> int:
    """Peak of a rank while it trains, as `plan` estimates it."""
    device = accelerator.device
    base = GPU_PROCESS_BYTES if device.type == "cuda" else CPU_PROCESS_BYTES
    stored = source.checkpoint.tensors[source.architecture.embedding.name].dtype
    work = Workload(
        batch_size, seq_len, accelerator.num_processes,
        compute_dtype(args.dtype, device).itemsize, stored.itemsize,
        args.gradient_checkpointing, args.load_in, is_partitioned(accelerator),
        is_offloaded(accelerator), args.trains_weights,
    )  # fmt: skip
    vocab_size = source.config.vocab_size
    return estimate_memory(source.architecture, vocab_size, work, base, 1.0).train


def _memory(device: torch.device) -> float:
    """Bytes of a rank: its device's, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
