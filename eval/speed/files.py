"""Loading and export against plain reading and copying: seconds, and peak memory above idle.

Each in a process of its own; idle is a process with its libraries and nothing read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from eval.speed.shapes import proportional_shape
from llm_vtrans.allocation import PrunePlan
from llm_vtrans.budget import Budget, dense_shape, parameter_cost
from llm_vtrans.export import Pruning, export_model
from llm_vtrans.families import Axis
from llm_vtrans.families.base import UNIT_AXES
from llm_vtrans.loading import load_model, open_source
from llm_vtrans.problem import Problem
from llm_vtrans.reporting import peak_rss
from llm_vtrans.rotation import Basis

ROOT = Path(__file__).resolve().parents[2]
SHARD_SIZE = 500_000_000


def read(folder: Path, _: Path) -> None:
    """Reads every tensor once: what no loader can be faster than."""
    checkpoint = open_source(str(folder)).checkpoint
    for name in checkpoint.tensors:
        checkpoint.read(name)


def load(folder: Path, _: Path) -> None:
    """Loads the model in the checkpoint's dtype."""
    source = open_source(str(folder))
    dtype = next(iter(source.checkpoint.tensors.values())).dtype
    load_model(source, dtype, torch.device("cpu"))


def copy(folder: Path, out: Path) -> None:
    """Copies the files: what no export can be faster than, for as many bytes."""
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(file, out / file.name)


def export(folder: Path, out: Path, is_rotated: bool = False) -> None:
    """Exports random units at half of all parameters."""
    source = open_source(str(folder))
    architecture = source.architecture
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    problem = Problem(architecture, cost, Budget("params", dense // 2, dense), 1, True)
    shape = proportional_shape(architecture, problem)
    counts = {
        Axis.HIDDEN: [shape.hidden], Axis.HEADS: list(shape.heads), Axis.FFN: list(shape.ffn)
    }  # fmt: skip
    keep = {axis.value: _random_units(counts[axis], architecture.num_units[axis])
            for axis in UNIT_AXES}  # fmt: skip
    keep[Axis.HIDDEN.value] = keep[Axis.HIDDEN.value][0]
    gate = {name: torch.ones(k.shape) for name, k in keep.items()}
    gate["layers"] = torch.ones(architecture.num_layers, 2)
    size = architecture.num_units[Axis.HIDDEN]
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    basis = Basis.rotation(rotation) if is_rotated else None
    pruning = Pruning(source.checkpoint, architecture, PrunePlan(keep, gate), basis)
    export_model(pruning, source.family, source.config, True, out, SHARD_SIZE)


def _random_units(counts: list[int], num_units: int) -> torch.Tensor:
    """As many units of each row, `(rows, num_units)` bool."""
    draw = torch.Generator().manual_seed(0)
    ranks = torch.rand(len(counts), num_units, generator=draw).argsort(1).argsort(1)
    return ranks < torch.tensor(counts)[:, None]


def export_rotated(folder: Path, out: Path) -> None:
    """The same from a rotated network."""
    export(folder, out, is_rotated=True)


PHASES: dict[str, Callable[[Path, Path], None]] = {
    "read every tensor": read,
    "load": load,
    "copy the files": copy,
    "export of half": export,
    "export of half, rotated": export_rotated,
}


def measure(phase: str, folder: Path) -> dict[str, float]:
    """Runs one phase in this process: seconds and the peak above idle in bytes."""
    idle = peak_rss()
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        start = time.perf_counter()
        PHASES[phase](folder, Path(out))
        return {"seconds": time.perf_counter() - start, "bytes": peak_rss() - idle}


def phases(folder: Path) -> dict[str, dict[str, float]]:
    """All phases on one checkpoint, each in a fresh process."""
    found = {}
    for phase in PHASES:
        command = [sys.executable, "-m", "eval.speed.files", phase, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        found[phase] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
