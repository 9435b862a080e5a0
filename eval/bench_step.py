"""Time of one mask-training step against a bare pass through the same frozen model.

    python eval/bench_step.py --model DIR [--batch-size 8 --seq-len 256 --rounds 10]

Bare: teacher forward, forward, cross-entropy, backward to the embeddings. Step: the same
with masks, distillation, KL, budget penalty and optimizer. Both run in turn in one process;
medians and their ratio are printed, and where a step's time goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_vtrans.attachment import MaskedModel
from llm_vtrans.budget import Budget, dense_shape, parameter_cost
from llm_vtrans.distillation import SelfDistillation, distillation_loss
from llm_vtrans.loading import load_model, open_source
from llm_vtrans.masks import VIBMasks
from llm_vtrans.reporting import table
from llm_vtrans.training import (
    INITIAL_LOG_VAR,
    MaskObjective,
    TrainingSettings,
    initial_shapes,
    make_optimizer,
)

T = TypeVar("T")
STRUCTURES = ("hidden", "heads", "ffn", "layers")


class Bench:
    """One model with masks, and the pieces of a step to be timed apart."""

    def __init__(self, name: str, batch_size: int, seq_len: int, dtype: torch.dtype):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_source(name)
        architecture = source.architecture
        cost = parameter_cost(architecture)
        dense = cost.of(dense_shape(architecture))
        self.model = load_model(source, dtype, self.device)
        settings = TrainingSettings(1, batch_size, 1, 0.1, 1e-6, 0, 1, 1, True)
        masks = VIBMasks(initial_shapes(architecture, STRUCTURES, True), INITIAL_LOG_VAR, 0)
        self.objective = MaskObjective(
            SelfDistillation(MaskedModel(self.model, architecture)),
            masks,
            cost,
            Budget("params", dense // 2, dense),
            settings,
        ).to(self.device)
        self.optimizer = make_optimizer(self.objective, 0.1)
        shape = (batch_size, seq_len)
        self.tokens = torch.randint(source.config.vocab_size, shape, device=self.device)
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Runs a piece and adds its seconds, device work included."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bare(self) -> Tensor:
        """Teacher forward, forward, loss and backward without anything of ours."""
        self.objective.masked.set_gates(None)
        with torch.no_grad():
            self.model(input_ids=self.tokens, use_cache=False)
        embedded = self.model.get_input_embeddings()(self.tokens).detach().requires_grad_()
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        return loss

    def step(self) -> Tensor:
        """A whole step as training does it."""
        loss = self.objective(self.tokens, 0, 0.5, 0.5)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def pieces(self) -> None:
        """The same step, its pieces timed one by one."""
        objective, masked, masks = self.objective, self.objective.masked, self.objective.masks
        masked.set_gates(None)
        with torch.no_grad():
            teacher = self.timed("teacher forward", lambda: masked(self.tokens))
        gates: dict[str, Tensor] = {}

        def draw() -> Tensor:
            gates.update(masks.sample(torch.Generator(self.device).manual_seed(0)))
            gates["layers"] = gates["layers"].expand(-1, 2)
            return gates["hidden"]

        self.timed("masks: draw", draw)
        masked.set_gates(gates)
        student = self.timed("student forward, gated", lambda: masked(self.tokens))
        loss = self.timed("loss", lambda: distillation_loss(student, teacher))

        def penalise() -> Tensor:
            sparsity = objective.expected_sparsity(masks.keep_probability(1.0))
            kl = masks.kl(dict.fromkeys(masks.names(), 1.0))
            return loss + 1e-6 * kl + objective.lagrangian(sparsity - 0.5)

        total = self.timed("masks: KL and budget", penalise)
        self.timed("backward", total.backward)
        self.timed("optimizer", self.optimizer.step)
        self.optimizer.zero_grad()


def main() -> None:
    """Prints the ratio and the split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="dense checkpoint")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    bench = Bench(args.model, args.batch_size, args.seq_len, getattr(torch, args.dtype))
    for _ in range(2):  # warm-up
        bench.bare()
        bench.step()
    for _ in range(args.rounds):  # in turn, so that both see the same machine
        bench.timed("bare", bench.bare)
        bench.timed("step", bench.step)
        bench.pieces()
    middle = {name: median(times) for name, times in bench.seconds.items()}
    step = middle["step"]
    rows: list[tuple[str, ...]] = [("", "ms", "share of step")]
    rows += [(n, f"{1e3 * t:.1f}", f"{100 * t / step:.1f}%") for n, t in middle.items()]
    print(
        f"{args.model}, batch {args.batch_size} x {args.seq_len} tokens, {args.dtype}, "
        f"{bench.device.type}, {torch.get_num_threads()} threads, median of {args.rounds}"
    )
    print(table(rows))
    print(f"step / bare = {step / middle['bare']:.3f}")


if __name__ == "__main__":
    main()
