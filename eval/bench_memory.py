"""Peak memory and time of loading and of streaming export, on a random checkpoint.

    python eval/bench_memory.py [--gigabytes 1.2] [--folder DIR]

Writes a LLaMA-shaped bfloat16 checkpoint with random weights in real shards, then measures,
each in a fresh process: reading every byte, loading the model, exporting half of it. Peaks
are resident memory above that of the idle process (libraries imported, nothing read).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
from transformers import LlamaConfig

from llm_vtrans.allocation import allocate_scores
from llm_vtrans.budget import Budget, dense_shape, parameter_cost
from llm_vtrans.export import Pruning, export_model
from llm_vtrans.families import Axis, family_for
from llm_vtrans.loading import load_model, open_source
from llm_vtrans.problem import Problem
from llm_vtrans.reporting import peak_rss, table
from llm_vtrans.rotation import Basis
from llm_vtrans.shard_writer import ShardWriter

SHARD_SIZE = 500_000_000


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """A llama of LLaMA-2's proportions with as many layers as the size takes."""
    hidden = 2048
    layer_bytes = 2 * (4 * hidden**2 + 3 * hidden * 5504 + 2 * hidden)
    layers = max(1, round((gigabytes * 1e9 - 2 * 2 * 32000 * hidden) / layer_bytes))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    named = family_for("llama").describe(config).named_tensors()
    specs = {name: (spec.shape, torch.bfloat16) for name, (spec, _) in named.items()}
    writer = ShardWriter(folder, specs, SHARD_SIZE)
    for name, (shape, dtype) in specs.items():
        writer.write(name, (0.02 * torch.randn(shape)).to(dtype))
    writer.close()


def read_all(folder: Path, _: Path) -> None:
    """Reads every tensor once: what no loader can be faster than."""
    checkpoint = open_source(str(folder)).checkpoint
    for name in checkpoint.tensors:
        checkpoint.read(name)


def load(folder: Path, _: Path) -> None:
    """Loads the model in bfloat16."""
    load_model(open_source(str(folder)), torch.bfloat16, torch.device("cpu"))


def export(folder: Path, out: Path, is_rotated: bool = False) -> None:
    """Exports random units at half of all parameters."""
    source = open_source(str(folder))
    architecture = source.architecture
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    generator = torch.Generator().manual_seed(0)
    units, layers = architecture.num_units, architecture.num_layers
    scores = {
        Axis.HIDDEN.value: torch.rand(units[Axis.HIDDEN], generator=generator).double(),
        Axis.HEADS.value: torch.rand(layers, units[Axis.HEADS], generator=generator).double(),
        Axis.FFN.value: torch.rand(layers, units[Axis.FFN], generator=generator).double(),
    }
    problem = Problem(architecture, cost, Budget("params", dense // 2, dense), 1, True)
    plan = allocate_scores(scores, {}, problem)
    size = units[Axis.HIDDEN]
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    basis = Basis.rotation(rotation) if is_rotated else None
    pruning = Pruning(source.checkpoint, architecture, plan, basis)
    export_model(pruning, source.family, source.config, True, out, SHARD_SIZE)


def export_rotated(folder: Path, out: Path) -> None:
    """The same from a rotated network."""
    export(folder, out, is_rotated=True)


PHASES: dict[str, Callable[[Path, Path], None]] = {
    "read": read_all,
    "load": load,
    "export": export,
    "export, rotated": export_rotated,
}


def measure(phase: str, folder: Path) -> None:
    """Runs one phase in this process and prints seconds and the peak above idle."""
    idle = peak_rss()
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        start = time.perf_counter()
        PHASES[phase](folder, Path(out))
        print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak_rss() - idle}))


def main() -> None:
    """Prints one row per phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--folder", help="where the checkpoint is written; a temporary one else")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        return measure(args.phase, Path(args.folder))
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "dense"
        folder.mkdir()
        write_checkpoint(folder, args.gigabytes)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        rows: list[tuple[str, ...]] = [
            ("phase", "seconds", "peak MB above idle", "share of checkpoint")
        ]
        for phase in PHASES:
            command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            result = json.loads(done.stdout.splitlines()[-1])
            share = result["bytes"] / size
            rows.append(
                (phase, f"{result['seconds']:.1f}", f"{result['bytes'] / 1e6:.0f}", f"{share:.2f}")
            )
        print(f"checkpoint of {size / 1e9:.2f} GB, shards of {SHARD_SIZE / 1e9:.1f} GB")
        print(table(rows))


if __name__ == "__main__":
    main()
