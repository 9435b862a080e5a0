"""Time of one training step of each stage against a bare pass through the same frozen model.

    python eval/bench_step.py --model DIR [--batch-size 8 --seq-len 256 --rounds 10]

Bare: teacher forward, forward, cross-entropy, backward to the embeddings. Search step: the
same with masks, distillation, KL, budget penalty and optimizer. Tune step: the same with maps
and factors. All run in turn in one process; medians and their ratios are printed, and where
the time of a search step goes.
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
from llm_vtrans.budget import Budget, Limit, complete, dense_shape, parameter_cost
from llm_vtrans.distillation import SelfDistillation
from llm_vtrans.distillation_loss import distillation_loss
from llm_vtrans.loading import load_model, open_source
from llm_vtrans.masks import VIBMasks
from llm_vtrans.reporting import table
from llm_vtrans.search import INITIAL_LOG_VAR, SearchObjective, initial_shapes
from llm_vtrans.training import Objective, TrainingSettings
from llm_vtrans.tune import TuneObjective
from llm_vtrans.tuning import Tuning

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
        settings = TrainingSettings(1, 1, batch_size, 1, 0.1, 1e-6, 0, 1, 1, True)
        tuning = Tuning(architecture, source.family.rotates)
        student = SelfDistillation(MaskedModel(self.model, architecture, tuning))
        masks = VIBMasks(initial_shapes(architecture, STRUCTURES, True), INITIAL_LOG_VAR, 0)
        limits = (Limit(cost, Budget("params", dense // 2, dense)),)
        self.objective = SearchObjective(student, masks, limits, settings).to(self.device)
        ones = complete({"layers": torch.ones(1, 1, device=self.device)}, architecture)
        half = ones["hidden"].clone()
        half[::2] = 0  # as a plan of half the size has it
        ones["hidden"] = half
        self.tune_objective = TuneObjective(student, ones, 0.0, settings).to(self.device)
        self.optimizer = self.objective.optimizer()
        self.tune_optimizer = self.tune_objective.optimizer()
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

    def search_step(self) -> Tensor:
        """A whole step of the mask search."""
        self.tune_objective.masked.tuning.is_on = False
        return self._step(self.objective, self.optimizer, 0)

    def tune_step(self) -> Tensor:
        """A whole step of the tuning that follows."""
        self.tune_objective.masked.tuning.is_on = True
        return self._step(self.tune_objective, self.tune_optimizer, 1)

    def _step(self, objective: Objective, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        objective.schedule(optimizer, step)
        loss: Tensor = objective({"input_ids": self.tokens}, 0, step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
            return loss + 1e-6 * kl + objective.lagrangian(sparsity[0] - 0.5)

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
        bench.search_step()
        bench.tune_step()
    for _ in range(args.rounds):  # in turn, so that both see the same machine
        bench.timed("bare", bench.bare)
        bench.timed("search step", bench.search_step)
        bench.pieces()
        bench.timed("tune step", bench.tune_step)
    middle = {name: median(times) for name, times in bench.seconds.items()}
    step = middle["search step"]
    rows: list[tuple[str, ...]] = [("", "ms", "share of search step")]
    rows += [(n, f"{1e3 * t:.1f}", f"{100 * t / step:.1f}%") for n, t in middle.items()]
    print(
        f"{args.model}, batch {args.batch_size} x {args.seq_len} tokens, {args.dtype}, "
        f"{bench.device.type}, {torch.get_num_threads()} threads, median of {args.rounds}"
    )
    print(table(rows))
    print(f"search step / bare = {step / middle['bare']:.3f}")
    print(f"tune step / bare = {middle['tune step'] / middle['bare']:.3f}")


if __name__ == "__main__":
    main()
