"""A whole run on a random checkpoint of real size: seconds and peak memory of each phase.

    python eval/bench_large.py --shape 7b [--set-up plain recomputing 4bit] [--folder DIR]

Writes a LLaMA-shaped bfloat16 checkpoint in real shards, reads every byte of it once, then runs
prune.py in a fresh process: loading, two steps of mask training, hardening, streaming export,
loading of the result. Peaks are resident memory of that process, beside what `llm-vtrans plan`
says. Options that are not listed by --help go to `prune`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from eval.speed.files import READ, measure
from eval.speed.shapes import SIZES, VOCAB_SIZE, llama, write_checkpoint
from llm_vtrans.loading.source import open_source
from llm_vtrans.preparation.resources import CPU_PROCESS_BYTES, GIB, Workload, estimate_memory
from llm_vtrans.record.reporting import table

SHARD_SIZE = 5_000_000_000
NUM_STEPS = 2
SET_UPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputing": {"recomputes": True},
    "4bit": {"form": "4bit"},
    "8bit": {"form": "8bit"},
}


def run(folder: Path, out: Path, set_up: str, args: argparse.Namespace) -> dict[str, Any]:
    """Phases of a run, from its manifest."""
    workload = SET_UPS[set_up]
    flags = ["--gradient-checkpointing"] if workload.get("recomputes") else []
    flags += ["--load-in", workload["form"]] if "form" in workload else []
    samples = NUM_STEPS * args.batch_size
    command = [
        sys.executable, "llm_vtrans/prune.py", "--model", str(folder), "--data", "embedded",
        "--sparsity", "0.5", "--output", str(out), "--dtype", args.dtype, "--log-every", "1",
        "--samples", str(samples), "--batch-size", str(args.batch_size),
        "--seq-len", str(args.seq_len), "--rotate", args.rotate, *flags, *args.more,
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    phases: dict[str, Any] = json.loads((out / "vtrans.json").read_text())["phases"]
    shutil.rmtree(out)
    return phases


def main() -> None:
    """Prints a row per phase and set-up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SIZES, default="7b", help="of the checkpoint of random weights")
    add("--set-up", nargs="+", choices=SET_UPS, default=["plain"], help="ways to run")
    add("--batch-size", type=int, default=1, help="sequences of a step")
    add("--seq-len", type=int, default=32, help="tokens in a sequence")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="as prune's")
    add("--rotate", default="none", choices=("none", "pca"), help="as prune's")
    add("--folder", help="where the checkpoint is written; a temporary one else")
    args, more = parser.parse_known_args()
    args.more = more
    rows: list[tuple[str, ...]] = [("phase", "seconds", "peak GiB", "planned GiB", "ratio")]
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "dense"
        write_checkpoint(folder, llama(*SIZES[args.shape]), SHARD_SIZE)
        rows.append(("read every byte", f"{measure(READ, folder)['seconds']:.1f}", "", "", ""))
        architecture = open_source(str(folder)).architecture
        for set_up in args.set_up:
            width = 2 if args.dtype == "bfloat16" else 4
            work = Workload(args.batch_size, args.seq_len, 1, width, **SET_UPS[set_up])
            planned = estimate_memory(architecture, VOCAB_SIZE, work, CPU_PROCESS_BYTES, 0.5)
            estimates = {
                "load": planned.load, "tune": planned.train, "export": planned.export,
                "score": planned.score,
            }  # fmt: skip
            phases = run(folder, Path(scratch) / "out", set_up, args)
            for name, phase in phases.items():
                peak, estimate = phase["peak_rss"] / GIB, estimates.get(name, 0) / GIB
                against = (f"{estimate:.2f}", f"{estimate / peak:.2f}") if estimate else ("", "")
                seconds = f"{phase['seconds']:.1f}"
                rows.append((f"{set_up}: {name}", seconds, f"{peak:.2f}", *against))
    print(
        f"{args.shape}, {args.dtype}, {NUM_STEPS} steps of {args.batch_size} x {args.seq_len} "
        f"tokens, rotation {args.rotate}, {torch.get_num_threads()} threads"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
