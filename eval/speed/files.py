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

from eval.speed.shapes import SHARD_SIZE, problem_of, proportional_plan
from llm_vtrans.basis.rotation import Basis
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.families import Axis
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.record.reporting import peak_rss

READ = "read every tensor"
ROOT = Path(__file__).resolve().parents[2]


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
    plan = proportional_plan(problem_of(architecture, 0.5))
    size = architecture.num_units[Axis.HIDDEN]
    rotation = torch.linalg.qr(torch.randn(size, size))[0]
    basis = Basis.rotation(rotation) if is_rotated else None
    pruning = Pruning(source.checkpoint, architecture, plan, basis)
    export_model(pruning, source.family, source.config, True, out, SHARD_SIZE)


def export_rotated(folder: Path, out: Path) -> None:
    """The same from a rotated network."""
    export(folder, out, is_rotated=True)


PHASES: dict[str, Callable[[Path, Path], None]] = {
    READ: read,
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
