"""The main job on tiny models: inputs, flags, processes of its own."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from llm_vtrans.record.masks_file import MASKS_FILE, TUNING_FILE
from tests.tiny import VOCAB_SIZE, save_tiny

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "llm_vtrans/prune.py"  # as in a checkout that is not installed
SEQ_LEN = 16
HALVES = ("--tune-share", "0.5")  # both stages take as many steps
QUICK_CHECKS = ("hashes", "shapes", "dtype", "parameters")  # of `verify`: those without a model


def write_inputs(folder: Path, num_paragraphs: int = 60, name: str = "llama") -> Path:
    """A tiny model with its tokenizer in `model`, and letters for it in `text.txt`."""
    save_tiny(name, folder / "model")
    draw = random.Random(0)
    letters = [chr(33 + token) for token in range(1, VOCAB_SIZE - 2)]
    paragraphs = ("".join(draw.choices(letters, k=100)) for _ in range(num_paragraphs))
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    return folder


def copy_inputs(source: Path, folder: Path) -> Path:
    """What `write_inputs` wrote, without a result, in another folder."""
    shutil.copytree(source / "model", folder / "model")
    shutil.copy(source / "text.txt", folder)
    return folder


def flags(folder: Path, *more: str, samples: int = 16, batch_size: int = 2) -> list[str]:
    """The command line for the inputs in `folder`; its result goes to `folder/out`."""
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "text.txt")),
        *("--output", str(folder / "out"), "--seq-len", str(SEQ_LEN), "--log-every", "1"),
        *("--samples", str(samples), "--batch-size", str(batch_size), *more),
    ]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def trained_tensors(result: Path) -> dict[str, Tensor]:
    """Masks, plan, rotation and tuning of a run, by their names on disk."""
    return {**load_file(result / MASKS_FILE), **load_file(result / TUNING_FILE)}


def start(arguments: list[str], *launcher: str, entry: str = ENTRY) -> subprocess.Popen[str]:
    """Starts the job, or another program, as a process from the repository root."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "OMP_NUM_THREADS": "1",
    }
    if "ACCELERATE_USE_DEEPSPEED" not in environment:  # the other would switch DeepSpeed off
        environment.setdefault("ACCELERATE_USE_CPU", "true")
    return subprocess.Popen(
        [sys.executable, *launcher, entry, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(arguments: list[str], *launcher: str, entry: str = ENTRY) -> str:
    """Runs the job to its end, which must be a success; returns its standard output."""
    process = start(arguments, *launcher, entry=entry)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output
