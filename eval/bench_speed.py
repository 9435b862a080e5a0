"""How fast pruning and the pruned model are, as ratios measured side by side in one run.

    python eval/bench_speed.py [--model DIR | random:160m] [--sparsity 0.5] [--output FILE]

step: a training step against a bare pass through the same frozen model (the teacher's forward
counted in both), and its share of the device's peak. kernels: what the device does in a step of
each stage. inference: dense against the checkpoints of --pruned or, without any, against random
ones that are smaller in proportion: loading, prefill, decode, memory. files: loading and export
against reading and copying. growth: how a step's time grows with the model and with the sequence.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of eval/: the checkout need not be installed

import torch
from transformers.utils import logging as transformers_logging

from eval.speed.files import READ, phases
from eval.speed.inference import compare
from eval.speed.kernels import is_product, step_kernels
from eval.speed.shapes import (
    RANDOM,
    SIZES,
    llama,
    problem_of,
    proportional_shape,
    write_checkpoint,
)
from eval.speed.training import step_times
from llm_vtrans.arguments import DTYPES
from llm_vtrans.commands.command import Parser, run_command
from llm_vtrans.errors import UserError
from llm_vtrans.loading.shaped import random_network, shaped_config
from llm_vtrans.loading.source import open_source
from llm_vtrans.preparation.planning import compute_dtype
from llm_vtrans.record.manifest import dtype_name
from llm_vtrans.record.output_folder import atomic_write_text
from llm_vtrans.record.reporting import table

GROWTH_SIZES = ((128, 352, 4, 4), (256, 704, 6, 4), (384, 1056, 8, 6), (512, 1408, 10, 8))
GROWTH_VOCAB = 4096
GROWTH_TOKENS = (128, 256, 512, 1024)
GROWTH_BATCH, GROWTH_SEQ_LEN = 4, 256
NUM_KERNELS, KERNEL_WIDTH = 10, 90


def step(args: argparse.Namespace, _: Path) -> dict[str, float]:
    """Ratios of both stages, and the split of a search step."""
    times = step_times(
        args.model, args.batch_size, args.seq_len, args.torch_dtype, args.rounds, splits=True
    )
    whole = times.seconds["search step"]
    rows = [("piece", "ms", "of a search step")]
    rows += [(n, f"{1e3 * s:.1f}", f"{100 * s / whole:.1f}%") for n, s in times.seconds.items()]
    print(table(rows))
    found = {
        "search step / bare": times.ratios["search step"],
        "tune step / bare": times.ratios["tune step"],
        "tokens per second of search": times.num_tokens / whole,
        "TFLOP/s of a large product": times.peak / 1e12,
        "share of it in a search step": times.utilisation,
    }
    if args.device == "cuda":
        found["peak memory of a step, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return _printed(found)


def kernels(args: argparse.Namespace, _: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by kernel, of a step of each stage."""
    found = step_kernels(args.model, args.batch_size, args.seq_len, args.torch_dtype)
    for name, times in found.items():
        total = sum(times.values())
        products = sum(ms for kernel, ms in times.items() if is_product(kernel))
        rows = [(f"largest in a {name}", "ms", "of all")]
        for kernel, ms in sorted(times.items(), key=lambda item: -item[1])[:NUM_KERNELS]:
            rows.append((kernel[:KERNEL_WIDTH], f"{ms:.2f}", f"{100 * ms / total:.1f}%"))
        print(table(rows))
        print(
            f"{total:.1f} ms in all, {total - products:.1f} ms of it ({1 - products / total:.1%}) "
            "neither matrix products nor attention\n"
        )
    return found


def inference(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Every figure of dense and pruned networks."""
    source = open_source(args.model)
    architecture = source.architecture
    stored = next(iter(source.checkpoint.tensors.values())).dtype
    folders = {"dense": source.checkpoint.folder, **{path.name: path for path in args.pruned}}
    for round_to in () if args.pruned else args.round_to:
        problem = problem_of(architecture, args.sparsity, round_to)
        shape = proportional_shape(architecture, problem)
        config = shaped_config(source.family, source.config, architecture, shape, is_uniform=True)
        name = f"multiples of {round_to}"
        folders[name] = scratch / name.replace(" ", "-")
        network = random_network(source, config, stored, torch.device(args.device))
        network.save_pretrained(folders[name])
        del network  # its memory is the measured processes'
        if args.device == "cuda":
            torch.cuda.empty_cache()
        print(
            f"{name}: {problem.cost.of(shape):,} of {problem.budget.dense:,} parameters: hidden "
            f"{shape.hidden}, heads {shape.heads[0]}, FFN {shape.ffn[0]}"
        )
    measured = compare([*folders.values()], args.dtype, args.seq_len, args.inference_rounds)
    found = dict(zip(folders, measured, strict=True))
    dense = found["dense"]
    rows = [("", *folders)]
    for figure, before in dense.items():
        ratios = (f"{after[figure]:,.1f} ({after[figure] / before:.2f})" for after in measured[1:])
        rows.append((figure, f"{before:,.1f}", *ratios))
    print(table(rows))
    return found


def files(args: argparse.Namespace, _: Path) -> dict[str, dict[str, float]]:
    """Seconds and memory of every phase."""
    folder = open_source(args.model).checkpoint.folder
    found = phases(folder)
    against = {"load": READ, "export of half": "copy the files",
               "export of half, rotated": "copy the files"}  # fmt: skip
    rows = [("phase", "seconds", "against", "peak MB above idle")]
    for name, figures in found.items():
        plain = found.get(against.get(name, ""))
        ratio = f"{figures['seconds'] / plain['seconds']:.2f}" if plain else ""
        rows.append((name, f"{figures['seconds']:.2f}", ratio, f"{figures['bytes'] / 1e6:,.0f}"))
    print(table(rows))
    return found


def growth(args: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Exponents of a search step's time in parameters and in tokens of a sequence."""
    by_size, by_length = [], []
    rows = [("parameters", "tokens in a sequence", "sequences", "ms")]

    def row(folder: Path, batch_size: int, seq_len: int) -> tuple[float, float, float]:
        times = step_times(str(folder), batch_size, seq_len, args.torch_dtype, args.rounds)
        seconds = times.seconds["search step"]
        rows.append(
            (f"{times.num_params:,}", str(seq_len), str(batch_size), f"{1e3 * seconds:.1f}")
        )
        return times.num_params, seq_len, seconds

    for number, sizes in enumerate(GROWTH_SIZES):
        folder = scratch / f"growth-{number}"
        write_checkpoint(folder, llama(*sizes, vocab_size=GROWTH_VOCAB))
        params, _, seconds = row(folder, GROWTH_BATCH, GROWTH_SEQ_LEN)
        by_size.append((params, seconds))
    for seq_len in GROWTH_TOKENS:
        _, length, seconds = row(folder, 1, seq_len)
        by_length.append((length, seconds))
    print(table(rows))
    found = {"exponent in parameters": exponent(by_size), "exponent in tokens": exponent(by_length)}
    return _printed(found)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through the logarithms of `(size, seconds)`."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    mean = [sum(column) / len(logs) for column in zip(*logs, strict=True)]
    covariance = sum((x - mean[0]) * (y - mean[1]) for x, y in logs)
    return covariance / sum((x - mean[0]) ** 2 for x, _ in logs)


def _printed(found: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        print(f"{name} = {value:.3f}")
    return found


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "step": step,
    "kernels": kernels,
    "inference": inference,
    "files": files,
    "growth": growth,
}


def run(arguments: list[str]) -> None:
    """Measures the sections that are asked for, prints them, writes FILE."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"dense checkpoint, or {RANDOM} and one of {', '.join(SIZES)}"
    parser.add_argument("--model", default=f"{RANDOM}160m", help=known)
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="to run"
    )
    parser.add_argument("--sparsity", type=float, default=0.5, help="of what dense is beside")
    parser.add_argument(
        "--round-to", type=int, nargs="+", default=[64], help="multiples of pruned dimensions"
    )
    parser.add_argument(
        "--pruned", type=Path, nargs="+", default=[], help="in place of smaller random checkpoints"
    )
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="windows in a training step; prune's has 2,048 tokens",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of training steps")
    parser.add_argument("--inference-rounds", type=int, default=1, help="processes per model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights, as prune's")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    args = parser.parse_args(arguments)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.torch_dtype = compute_dtype(args.dtype, torch.device(args.device))
    args.dtype = dtype_name(args.torch_dtype)
    figures: dict[str, Any] = {}
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        size = args.model.removeprefix(RANDOM)
        if size != args.model:
            if size not in SIZES:
                raise UserError(f"--model {args.model}: sizes are {', '.join(SIZES)}")
            args.model = str(scratch / size)
            write_checkpoint(Path(args.model), llama(*SIZES[size]))
        device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        print(
            f"{size}, {args.batch_size} x {args.seq_len} tokens, {args.dtype}, {device}, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
        )
        for section in args.sections:
            print(f"\n{section}")
            figures[section] = SECTIONS[section](args, scratch)
    if args.output:
        atomic_write_text(args.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
