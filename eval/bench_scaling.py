"""Weak scaling of mask training over ranks on one machine, and what communication takes.

    python eval/bench_scaling.py --model DIR [--ranks 1 2 --batch-size 4 --seq-len 256]

Every rank trains the same number of tokens, so that twice the ranks do twice the work; the
product's own loop runs (`training.train`), in processes of `torch.distributed.run`, gloo on a
CPU. Rounds of every number of ranks take turns. Communication is the time inside collectives,
waiting for a slower rank included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
from accelerate import Accelerator

from eval.speed.training import Bench
from llm_vtrans.commands.command import is_rank_zero
from llm_vtrans.record.reporting import table
from llm_vtrans.tasks.encoding import Examples
from llm_vtrans.training.loop import Progress, TrainingSettings, train
from llm_vtrans.training.preemption import Preemption

WARM_UP = 2  # steps


class TimedAccelerator(Accelerator):
    """Adds up the seconds inside collectives: `train` calls no other."""

    seconds = 0.0

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """As `Accelerator.reduce`."""
        start = time.perf_counter()
        result = super().reduce(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def train_as_rank(args: argparse.Namespace) -> None:
    """One rank's training; rank zero writes its seconds per step to `--worker`."""
    torch.manual_seed(0)  # the same masks on every rank
    accelerator = TimedAccelerator(cpu=True)
    bench = Bench(args.model, args.batch_size, args.seq_len, torch.float32)
    num_steps = WARM_UP + args.steps
    bench.objective.stage = range(num_steps)
    settings = TrainingSettings(
        num_steps, 0, args.batch_size, 1, 0.1, 1e-6, 0, WARM_UP, num_steps + 1, True
    )
    num_samples = num_steps * args.batch_size * accelerator.num_processes
    shape = (num_samples, args.seq_len)
    tokens = torch.randint(bench.model.config.vocab_size, shape)
    marks: list[tuple[float, float]] = []

    def report(progress: Progress) -> None:
        if progress.step in (WARM_UP, num_steps):
            marks.append((time.perf_counter(), accelerator.seconds))

    train(
        bench.objective, bench.optimizer, Examples({"input_ids": tokens}), accelerator, settings,
        0, report, lambda _: None, Preemption(),
    )  # fmt: skip
    (start, waited), (stop, waited_too) = marks
    step, communication = (stop - start) / args.steps, (waited_too - waited) / args.steps
    if is_rank_zero():
        args.worker.write_text(json.dumps({"step": step, "communication": communication}))
    accelerator.end_training()


def measure(args: argparse.Namespace, num_ranks: int, result: Path) -> dict[str, float]:
    """Seconds per step of a launch of so many ranks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(num_ranks), __file__, "--model", args.model, "--worker", str(result),
        "--batch-size", str(args.batch_size), "--seq-len", str(args.seq_len),
        "--steps", str(args.steps),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    found: dict[str, float] = json.loads(result.read_text())
    return found


def main() -> None:
    """Prints a row per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--batch-size", type=int, default=4, help="per rank")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=10, help="measured, after the warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        train_as_rank(args)
        return
    found: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.rounds):
            for num_ranks in args.ranks:
                one = measure(args, num_ranks, Path(scratch) / "result.json")
                found.setdefault(num_ranks, []).append(one)
    print(
        f"{args.model}, {args.batch_size} x {args.seq_len} tokens per rank and step, one thread "
        f"per rank, median of {args.rounds} rounds of {args.steps} steps"
    )
    rows: list[tuple[str, ...]] = [
        ("ranks", "ms per step", "tokens per second", "efficiency", "communication")
    ]
    alone = 0.0
    for num_ranks, results in found.items():
        step = median(result["step"] for result in results)
        share = median(result["communication"] / result["step"] for result in results)
        alone = alone or step
        rate = num_ranks * args.batch_size * args.seq_len / step
        efficiency = f"{alone / step:.2f}"
        rows.append(
            (str(num_ranks), f"{1e3 * step:.0f}", f"{rate:.0f}", efficiency, f"{share:.1%}")
        )
    print(table(rows))


if __name__ == "__main__":
    main()
