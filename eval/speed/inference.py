"""Dense against pruned as a user meets them: loading, prefill, decode, memory, files.

Each model is measured in a process of its own that loads it with stock `transformers`. On a GPU,
where small passes wait for the processor that launches kernels and wide ones for everything between
matrix products, decoding is also timed as `generate` does it with a static cache, compiled and
replayed as graphs, and prefill with every layer compiled.
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
from accelerate.utils import compile_regions
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from llm_vtrans.record.reporting import peak_rss
from llm_vtrans.timing.latency import Pass, median_ms

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZES = (1, 16)
NEW_TOKENS = 64  # of which two runs of `generate` differ
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
        found[f"{timed}, tokens/s"] = tokens_per_second(timed, model)
    is_cuda = device.type == "cuda"
    if is_cuda:
        for size in BATCH_SIZES:
            name = f"decode:{size} at token {seq_len}, static cache, tokens/s"
            found[name] = generated_per_second(model, size, seq_len)
        model.config.use_cache = False  # else every layer is compiled for itself
        layers = compile_regions(model, dynamic=False)
        for timed in passes(seq_len):
            if not timed.is_decode:
                found[f"{timed}, compiled, tokens/s"] = tokens_per_second(timed, layers)
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_rss() - idle
    return {**found, "peak memory, MB": peak / MB}


def tokens_per_second(timed: Pass, model: Any) -> float:
    """Tokens per second of a pass; of decoding, new ones."""
    tokens = timed.batch_size * (1 if timed.is_decode else timed.seq_len)
    return tokens / (1e-3 * timed.milliseconds(model))


def generated_per_second(model: Any, batch_size: int, seq_len: int) -> float:
    """Tokens per second of greedy decoding with a static cache.

    Args:
        model: causal, in evaluation mode, on one device.
        batch_size: sequences.
        seq_len: tokens in each before the new ones.
    """
    tokens = torch.ones(batch_size, seq_len, dtype=torch.long, device=model.device)
    given = {"attention_mask": torch.ones_like(tokens), "do_sample": False,
             "pad_token_id": 0, "cache_implementation": "static"}  # fmt: skip

    def milliseconds(num: int) -> float:
        count = {"min_new_tokens": num, "max_new_tokens": num}
        return median_ms(lambda: model.generate(tokens, **count, **given), tokens.is_cuda)

    longer = milliseconds(2 * NEW_TOKENS)  # first: its cache serves the other, too
    return batch_size * NEW_TOKENS / (1e-3 * (longer - milliseconds(NEW_TOKENS)))


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
