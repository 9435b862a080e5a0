"""Dense against pruned as a user meets them: loading, prefill, decode, memory, files.

Each model is measured in a process of its own that loads it with stock `transformers`. What slows
the machine down for a while must not look like a network that is slower, so passes of a pruned one
are timed in alternation with the dense one's. On a GPU, where small passes wait for the processor
that launches kernels and wide ones for everything between matrix products, decoding is also timed
as `generate` does it with a static cache, compiled and replayed as graphs, and prefill with every
layer compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
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
NOISE = 0.02  # of a time, as a share
MB = 1e6


def passes(seq_len: int) -> list[Pass]:
    """What is timed."""
    return [Pass(is_decode, size, seq_len) for is_decode in (False, True) for size in BATCH_SIZES]


def measure(
    folder: Path, dtype: torch.dtype, seq_len: int, dense: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of one checkpoint, in this process.

    Args:
        folder: of the checkpoint.
        dtype: of its passes.
        seq_len: tokens of a sequence.
        dense: another one that it is timed beside, if any.

    Returns:
        Its figures by name, and those of passes as multiples of the dense checkpoint's.
    """
    idle = peak_rss()
    start = time.perf_counter()
    model = _loaded(folder, dtype)
    found = {
        "checkpoint, MB": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / MB,
        "load, s": time.perf_counter() - start,
    }
    for timed in passes(seq_len):
        if dense is None:
            found[_rate(timed)] = tokens_per_second(timed, model)
        else:
            timed.work(model)()  # for its memory
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        for size in BATCH_SIZES:
            name = f"decode:{size} at token {seq_len}, static cache, tokens/s"
            found[name] = generated_per_second(model, size, seq_len)
        keeps_cache = model.config.use_cache
        model.config.use_cache = False  # else every layer is compiled for itself
        layers = compile_regions(model, dynamic=False)
        for timed in passes(seq_len):
            if not timed.is_decode:
                found[f"{timed}, compiled, tokens/s"] = tokens_per_second(timed, layers)
        model.config.use_cache = keeps_cache
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_rss() - idle
    found["peak memory, MB"] = peak / MB
    if dense is None:
        return found, {}
    other = _loaded(dense, dtype)
    return found, {_rate(t): 1 / t.relative(model, other, NOISE) for t in passes(seq_len)}


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _rate(timed: Pass) -> str:
    return f"{timed}, tokens/s"


def tokens_per_second(timed: Pass, model: Any) -> float:
    """Tokens per second of a pass; of decoding, new ones."""
    tokens = timed.batch_size * (1 if timed.is_decode else timed.seq_len)
    return tokens / (1e-3 * timed.milliseconds(model, NOISE))


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
    """Figures of several checkpoints, the first of them dense; medians of rounds taken in turn."""
    dense, *_ = folders
    found: list[list[tuple[dict[str, float], dict[str, float]]]] = [[] for _ in folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(rounds):
        for results, folder in zip(found, folders, strict=True):
            words = ["-m", "eval.speed.inference", str(folder), dtype, str(seq_len)]
            if folder != dense:
                words.append(str(dense))
            done = subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.PIPE, env=environment
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = [[_medians(part) for part in zip(*results, strict=True)] for results in found]
    before = medians[0][0]
    return [
        {name: own[name] if name in own else before[name] * ratios[name] for name in before}
        for own, ratios in medians
    ]


def _medians(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(entry[name] for entry in figures) for name in figures[0]}


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    which, dtype_name, num_tokens, *beside = sys.argv[1:]
    dense_folder = Path(beside[0]) if beside else None
    print(
        json.dumps(measure(Path(which), getattr(torch, dtype_name), int(num_tokens), dense_folder))
    )
