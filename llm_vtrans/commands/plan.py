"""`llm-vtrans plan`: what a run would take, from the config alone.

Prints parameters and multiply-accumulates before and after, memory of a rank in each phase for
every way to launch the run, seconds at a stated utilisation, and which launch file to use.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from transformers import AutoConfig

from llm_vtrans.arguments import NUM_STEPS, SIZES, SUFFIXES, Count, PruneArguments
from llm_vtrans.budget.cost import dense_shape, mac_cost
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError
from llm_vtrans.families import Architecture, family_for
from llm_vtrans.loading.source import EMBEDDED
from llm_vtrans.preparation.resources import (
    CPU_PROCESS_BYTES,
    GPU_PROCESS_BYTES,
    MARGIN,
    Memory,
    Workload,
    describe_bytes,
    estimate_memory,
    host_memory,
    tokens_of_window,
    training_flops,
    weight_bytes,
)
from llm_vtrans.record.reporting import table

GPU_PEAK = "990T"  # an H100's in bfloat16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Launch:
    """One way to start the run.

    Attributes:
        file: launch file.
        flags: further options of prune.py.
        work: the workload on each rank.
    """

    file: str
    flags: str
    work: Workload


def launches(work: Workload, num_gpus: int) -> list[Launch]:
    """Ways to start a run, the fastest first."""
    if not num_gpus:
        two = replace(work, num_ranks=2)
        ways = [("single.yaml", work), ("cpu_two_ranks.yaml", two)]
    else:
        ways = [("single.yaml" if num_gpus == 1 else "multi_gpu.yaml", work)]
        sliced = replace(work, is_sliced=True)
        ways += [("zero3.yaml", sliced)] if num_gpus > 1 else []
        ways += [("zero3_offload.yaml", replace(sliced, is_offloaded=True))]
    found = []
    for file, one in ways:
        found.append(Launch(file, "", one))
        found.append(Launch(file, "--gradient-checkpointing", replace(one, recomputes=True)))
        if not one.is_sliced:
            for form in ("8bit", "4bit"):
                few = replace(one, recomputes=True, form=form)
                found.append(Launch(file, f"--gradient-checkpointing --load-in {form}", few))
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="llm-vtrans plan", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=EMBEDDED, help="folder or hub id; only its config is read")
    add("--revision", help="of a hub model")
    add("--sparsity", type=float, default=0.5, help="share of all parameters to remove")
    add("--gpus", type=int, default=0, help="GPUs in all; 0 plans for the CPU")
    add("--gpu-memory", default="80GB", help="of one GPU, such as 24GB or 80GB")
    add("--host-memory", help="of one machine; default: this one's")
    add("--samples", type=int, help="calibration sequences; default as prune's")
    add("--batch-size", type=int, help="sequences per rank and micro-batch; default as prune's")
    add("--seq-len", type=int, help="tokens in a sequence; default 512 or the model's context")
    add("--dtype", choices=DTYPE_BYTES, help="default bfloat16 on GPUs, float32 on the CPU")
    add("--peak", help=f"operations a second of one device; default {GPU_PEAK} on GPUs")
    add("--mfu", type=float, default=0.4, help="share of that which a run reaches")
    args = parser.parse_args(arguments)
    args.peak = args.peak or (GPU_PEAK if args.gpus else None)
    for name, least in (("samples", 1), ("batch_size", 1), ("seq_len", 2)):
        if (number := getattr(args, name)) is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {number}")
    for name in ("sparsity", "mfu"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} must be in (0, 1), got {getattr(args, name)}")
    if args.gpus < 0:
        raise UserError(f"--gpus must not be negative, got {args.gpus}")
    return args


def _number(flag: str, text: str, units: dict[str, int]) -> float:
    """A number with a unit such as 80GB or 990T."""
    digits = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(digits) :]
    try:
        number = float(digits) * units[unit]
    except (KeyError, ValueError) as error:
        raise UserError(f"{flag} {text!r}: expected a number with one of {list(units)}") from error
    if not 0 < number < math.inf:
        raise UserError(f"{flag} {text!r}: must be above 0")
    return number


def read_config(name: str, revision: str | None) -> Any:
    """The model's config, from a folder or the hub; no weights are fetched.

    Raises:
        UserError: there is none.
    """
    place = str(EMBEDDED_MODEL) if name == EMBEDDED else name
    try:
        return AutoConfig.from_pretrained(place, revision=revision)
    except Exception as error:  # transformers and the hub raise many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model {name}: its config cannot be read ({reason})") from error


def plan(arguments: list[str]) -> None:
    """Prints what a run would take.

    Args:
        arguments: the command line without the program's name.

    Raises:
        UserError: something the user can correct.
    """
    args = _parse(arguments)
    config = read_config(args.model, args.revision)
    architecture = family_for(config.model_type).describe(config)
    seq_len = tokens_of_window(args.seq_len, architecture)
    prune = PruneArguments(batch_size=Count(args.batch_size or 0), samples=args.samples or 0)
    batch_size = prune.filled(seq_len, 1).batch_size
    dtype = args.dtype or ("bfloat16" if args.gpus else "float32")
    stored = config.dtype or torch.float32  # what configs that do not say mean
    work = Workload(batch_size, seq_len, max(1, args.gpus), DTYPE_BYTES[dtype], stored.itemsize)
    _print_model(args, config, architecture, seq_len)
    base = GPU_PROCESS_BYTES if args.gpus else CPU_PROCESS_BYTES
    limit = _number("--gpu-memory", args.gpu_memory, SIZES) if args.gpus else 0.0
    host = _number("--host-memory", args.host_memory, SIZES) if args.host_memory else host_memory()
    rows: list[tuple[str, ...]] = [
        ("launch/accelerate/", "load", "train", "export", "score", "host", "time", "fits")
    ]
    first: Launch | None = None
    for launch in launches(work, args.gpus):
        memory = estimate_memory(
            architecture, config.vocab_size, launch.work, base, 1 - args.sparsity
        )
        fits = _fits(architecture, launch, memory, limit, host)
        first = first or (launch if fits else None)
        rows.append(_row(args, prune, architecture, launch, memory, fits))
    print(table(rows))
    what = f"{args.samples} sequences" if args.samples else f"{NUM_STEPS[prune.variant]} steps"
    if args.peak:
        print(f"time: {what} at {args.mfu:.0%} of {args.peak} operations/s a device")
    if first is None:
        print("none fits: lower --batch-size or --seq-len, or bring more memory")
        return
    print(
        f"\nuse: accelerate launch --config_file launch/accelerate/{first.file} "
        f"--num_processes {first.work.num_ranks} \\\n    llm_vtrans/prune.py --model {args.model} "
        f"--sparsity {args.sparsity:g} --batch-size {batch_size} --seq-len {seq_len} "
        f"{first.flags}".rstrip()
    )


def _print_model(
    args: argparse.Namespace, config: Any, architecture: Architecture, seq_len: int
) -> None:
    params = architecture.num_parameters
    macs = int(mac_cost(architecture, seq_len).of(dense_shape(architecture)))
    kept = 1 - args.sparsity
    print(
        f"{args.model}: {config.model_type}, {architecture.num_layers} layers\n"
        f"parameters {params:,} -> at most {int(kept * params):,}\n"
        f"MACs of {seq_len} tokens {macs:,} -> about {int(kept * macs):,} "
        "(as many as parameters go; what goes is decided in training)\n"
    )


def _fits(
    architecture: Architecture, launch: Launch, memory: Memory, limit: float, host: float
) -> bool:
    if not limit:
        return memory.peak * launch.work.num_ranks <= MARGIN * host
    return memory.peak <= MARGIN * limit and _host_bytes(architecture, launch) <= MARGIN * host


def _host_bytes(architecture: Architecture, launch: Launch) -> int:
    """Host memory of all ranks together: processes, a tensor on its way, offloaded slices."""
    whole = weight_bytes(architecture, replace(launch.work, is_sliced=False))
    offloaded = whole if launch.work.is_offloaded else 0
    return launch.work.num_ranks * 2 * CPU_PROCESS_BYTES + offloaded


def _row(
    args: argparse.Namespace,
    prune: PruneArguments,
    architecture: Architecture,
    launch: Launch,
    memory: Memory,
    fits: bool,
) -> tuple[str, ...]:
    work = launch.work
    seconds = "-"
    if args.peak:
        peak = _number("--peak", args.peak, SUFFIXES) * args.mfu * work.num_ranks
        samples = prune.filled(work.seq_len, work.num_ranks).num_samples()
        seconds = f"{training_flops(architecture, work, samples) / peak:,.0f} s"
    host = describe_bytes(_host_bytes(architecture, launch)) if args.gpus else "-"
    phases = (memory.load, memory.train, memory.export, memory.score)
    sizes = (describe_bytes(size) for size in phases)
    name = f"{launch.file} {launch.flags}".rstrip()
    return (name, *sizes, host, seconds, "yes" if fits else "no")
