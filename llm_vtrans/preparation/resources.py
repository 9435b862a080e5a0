"""What a run needs before it is started: memory of a rank in each phase, operations, seconds.

Everything is counted from the family's tensor table, but for what the process itself holds.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from llm_vtrans.budget.cost import dense_shape, mac_cost
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Architecture, Axis, Sublayer
from llm_vtrans.masking.tuning import num_maps
from llm_vtrans.training.distillation_loss import CHUNK_LOGITS

GIB = 2**30
MAX_SEQ_LEN = 512  # of a calibration window, unless the user wants longer ones
MARGIN = 0.9  # of a device's memory: allocators fragment
CPU_PROCESS_BYTES = int(0.42 * GIB)  # python, torch, transformers, datasets at work, no model
GPU_PROCESS_BYTES = int(0.75 * GIB)  # CUDA context, libraries' workspaces
QUANTISED_PROCESS_BYTES = int(0.1 * GIB)  # bitsandbytes when it is loaded
ADAM_COPIES = 4  # what is trained, its gradient and two moments
MAP_COPIES = 3  # a map, its gradient and the mean of these
STEP_COPIES = 10  # of a single map, while it takes a step
MOMENT_COPIES = 16  # of one: second moments on both sides of maps in four places, and inverses
BYTES_4BIT = 0.5 + 1 / 16  # a float32 scale for each block of 64


@dataclass(frozen=True)
class Workload:
    """How a run is set up.

    Attributes:
        batch_size: sequences per rank and micro-batch.
        seq_len: tokens in a sequence.
        num_ranks: processes.
        dtype_bytes: of a parameter and an activation.
        stored_bytes: of a parameter in the checkpoint.
        recomputes: `--gradient-checkpointing`.
        form: `full`, `4bit` or `8bit`.
        is_sliced: ZeRO-3.
        is_offloaded: the slices lie in host memory.
        trains_weights: in float32, beside a frozen teacher.
    """

    batch_size: int
    seq_len: int
    num_ranks: int = 1
    dtype_bytes: int = 2
    stored_bytes: int = 2
    recomputes: bool = False
    form: str = "full"
    is_sliced: bool = False
    is_offloaded: bool = False
    trains_weights: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a rank's micro-batch."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Memory:
    """Peak of one rank by phase, in bytes on the device that computes.

    Attributes:
        load: the weights and a tensor on its way.
        train: weights, activations, masks.
        export: rank zero's, writing the result.
        score: the result, loaded.
    """

    load: int
    train: int
    export: int
    score: int

    @property
    def peak(self) -> int:
        """The largest of the phases."""
        return max(self.load, self.train, self.export, self.score)


def host_memory() -> int:
    """Of this machine, or what a batch system or container allows of it, in bytes.

    Raises:
        UserError: the system does not tell.
    """
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return min([int(line.split()[1]) * 1024, *memory_limits()])
    raise UserError("this system does not tell its memory: give --host-memory or --batch-size")


def memory_limits(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What the control groups of this process and those around them allow, in bytes.

    Args:
        groups: lines `number:controllers:path`; without controllers of version 2.
        root: where the groups are mounted.
    """
    found: list[int] = []
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = (root / "memory" if controllers else root) / path.lstrip("/")
        for group in [folder, *folder.parents]:
            with suppress(OSError, ValueError):  # not limited, or no group
                found.append(int((group / name).read_text()))
    return found


def weight_bytes(architecture: Architecture, work: Workload) -> int:
    """Of the frozen weights on one rank."""
    per_entry = {"full": float(work.dtype_bytes), "8bit": 1.0, "4bit": BYTES_4BIT}[work.form]
    total = 0.0
    for spec, _ in architecture.named_tensors().values():
        is_matrix = spec.sublayer is not None and len(spec.dims) == 2
        total += prod(spec.shape) * (per_entry if is_matrix else work.dtype_bytes)
    if work.is_sliced:
        total = 0 if work.is_offloaded else total / work.num_ranks
    return int(total)


def largest_layer_bytes(architecture: Architecture, work: Workload) -> int:
    """What ZeRO-3 gathers at a time: a layer while the next one is fetched, or the vocabulary."""
    layer = sum(prod(s.shape) for s in architecture.tensors if s.sublayer is not None)
    largest = max(prod(spec.shape) for spec in architecture.tensors)
    return work.dtype_bytes * max(2 * layer, largest)


def activation_bytes_per_token(architecture: Architecture, work: Workload) -> float:
    """What the backward pass keeps of one token, the head's chunk of logits apart.

    With frozen weights a linear map keeps nothing. Of a layer remain: of each norm its input in
    float32 and its output's gate, queries, keys, values and the attention's output, and what
    enters each element-wise product of the FFN.
    """
    hidden = architecture.num_units[Axis.HIDDEN]
    units, ffn_inputs = 0, 0
    for spec in architecture.tensors:
        if spec.sublayer is None or len(spec.dims) != 2:
            continue
        units += sum(dim.size for dim in spec.dims if dim.axis not in (None, Axis.HIDDEN))
        ffn_inputs += spec.sublayer is Sublayer.FFN
    # A gated FFN (three matrices) multiplies once more than a plain one (two).
    units += (ffn_inputs - 2) * architecture.num_units[Axis.FFN]
    layer = work.dtype_bytes * (2 * hidden + units) + 2 * 4 * hidden
    layers = architecture.num_layers
    if work.recomputes:
        return float(layers * work.dtype_bytes * hidden + layer)
    return float(layers * layer)


def num_masks(architecture: Architecture) -> int:
    """Gates of all structures."""
    units, layers = architecture.num_units, architecture.num_layers
    return units[Axis.HIDDEN] + layers * (units[Axis.HEADS] + units[Axis.FFN] + 2)


def tokens_of_window(asked: int | None, architecture: Architecture) -> int:
    """Tokens in a calibration window: as many as are asked for, or what the model takes.

    Raises:
        UserError: longer than the model's context.
    """
    longest = architecture.max_positions
    if asked is not None and asked > longest:
        raise UserError(f"--seq-len {asked} is longer than the model's context of {longest} tokens")
    return asked or min(MAX_SEQ_LEN, longest)


def estimate_memory(
    architecture: Architecture, vocab_size: int, work: Workload, base: int, kept_share: float
) -> Memory:
    """Peak memory of one rank.

    Args:
        architecture: table of the dense model.
        vocab_size: logits of a token.
        work: how the run is set up.
        base: bytes that the process holds before it loads anything.
        kept_share: of the weights, in the result.
    """
    base += QUANTISED_PROCESS_BYTES if work.form != "full" else 0
    weights = base + weight_bytes(architecture, work)
    largest = max(prod(spec.shape) for spec in architecture.tensors)
    gathered = largest_layer_bytes(architecture, work) if work.is_sliced else 0
    hidden = architecture.num_units[Axis.HIDDEN]
    maps = (num_maps(architecture) * MAP_COPIES + STEP_COPIES + MOMENT_COPIES) * hidden**2
    trained = max(2 * num_masks(architecture) * ADAM_COPIES, maps)
    trained += architecture.num_parameters * ADAM_COPIES if work.trains_weights else 0
    kept = work.tokens * (activation_bytes_per_token(architecture, work) + 3 * 4 * hidden)
    # Logits of student and teacher, and three intermediate results of their distance.
    chunk = min(CHUNK_LOGITS, work.tokens * vocab_size) * (2 * work.dtype_bytes + 3 * 4)
    # Perplexity of held-out windows: all logits of a batch and their logarithms in float32.
    widened = 4 if work.dtype_bytes == 4 else 4 + 4
    scored = work.tokens * vocab_size * (work.dtype_bytes + widened)
    train = max(int(kept) + chunk + 4 * trained, scored)
    result = kept_share * weight_bytes(architecture, replace(work, form="full"))
    # Files are mapped while they are read, and stay mapped where nothing is converted.
    read = 0 if work.dtype_bytes == work.stored_bytes else result / work.dtype_bytes
    return Memory(
        load=weights + work.dtype_bytes * largest,
        train=weights + gathered + train,
        # A matrix in float32, what becomes of it, and the rotation.
        export=base + 4 * hidden**2 + 2 * 4 * largest,
        score=base + int(result) + gathered + max(int(read * work.stored_bytes), scored),
    )


def training_flops(architecture: Architecture, work: Workload, num_samples: int) -> float:
    """Operations of mask training: teacher, student and a backward pass without weight gradients.

    A pass takes two operations per multiply-accumulate; recomputation adds one pass.
    """
    macs = int(mac_cost(architecture, work.seq_len).of(dense_shape(architecture)))
    return 2.0 * macs * num_samples * (4 if work.recomputes else 3)


def describe_bytes(count: float) -> str:
    """Gibibytes with two digits."""
    return f"{count / GIB:.2f} GiB"
