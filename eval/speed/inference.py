"""Dense against pruned as a user meets them: loading, prefill, decode, memory, files.

Each model is measured in a process of its own that loads it with stock `transformers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from llm_vtrans.record.reporting import peak_rss
from llm_vtrans.timing.latency import Pass

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZES = (1, 16)
MB = 1e6


def passes(seq_len: int) -> list[Pass]:
    """What is timed."""
    return [Pass(is_decode, size, seq_len) for is_decode in (False, True) for size in BATCH_SIZES]


def measure(folder: Path, dtype: torch.dtype, seq_len: int) -> dict[str, float]:
    """Figures of one checkpoint, in this process."""
    idle = peak_rss()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    found = {
        "checkpoint, MB": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / MB,
        "load, s": time.perf_counter() - start,
    }
    for timed in passes(seq_len):
        tokens = timed.batch_size * (1 if timed.is_decode else timed.seq_len)
        found[f"{timed}, tokens/s"] = tokens / (1e-3 * timed.milliseconds(model))
    is_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_rss() - idle
    return {**found, "peak memory, MB": peak / MB}


def compare(folders: list[Path], dtype: str, seq_len: int, rounds: int) -> list[dict[str, float]]:
    """Figures of several checkpoints, each the median of rounds taken in turn."""
    found: list[list[dict[str, float]]] = [[] for _ in folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(rounds):
        for results, folder in zip(found, folders, strict=True):
            words = ["-m", "eval.speed.inference", str(folder), dtype, str(seq_len)]
            done = subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.PIPE, env=environment
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return [{name: median(r[name] for r in results) for name in results[0]} for results in found]


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    measured = measure(Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(measured))
