"""A training step of each stage against a bare pass through the same frozen model.

Bare: teacher forward, forward, cross-entropy, backward to the embeddings. Search step: the
same with masks, distillation, KL, budget penalty and optimizer. Tune step: the same with maps
and factors, on a network from which half of the parameters went. All run in turn in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.speed.shapes import problem_of, proportional_plan
from llm_vtrans.allocation.choosing import hard_gates
from llm_vtrans.budget.cost import dense_shape, mac_cost
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.by_layer import KEPT_HIDDEN
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.preparation.planning import default_multiple
from llm_vtrans.timing.latency import median_ms
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.distillation_loss import distillation_loss
from llm_vtrans.training.loop import Objective, TrainingSettings
from llm_vtrans.training.orthogonal import EVERY
from llm_vtrans.training.search import INITIAL_LOG_VAR, SearchObjective, initial_shapes
from llm_vtrans.training.smaller import narrow
from llm_vtrans.training.tune import TuneObjective

T = TypeVar("T")
SPARSITY = 0.5
STRUCTURES = ("hidden", "heads", "ffn", "layers")
PASSES = 3  # of two operations per multiply-accumulate: teacher, student, gradients of activations
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}


class Bench:
    """One model with masks, and the pieces of a step to be timed apart."""

    def __init__(self, name: str, batch_size: int, seq_len: int, dtype: torch.dtype):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_source(name)
        architecture = source.architecture
        self.num_params = architecture.num_parameters
        macs = mac_cost(architecture, seq_len).of(dense_shape(architecture))
        self.operations = 2 * PASSES * batch_size * macs
        self.model = load_model(source, dtype, self.device)
        settings = TrainingSettings(1, 1, batch_size, 1, 0.1, 1e-6, 0, 1, 1, True)
        problem = problem_of(architecture, SPARSITY, default_multiple(self.device))
        masks = VIBMasks(initial_shapes(architecture, STRUCTURES, True), INITIAL_LOG_VAR, 0)
        student = SelfDistillation(MaskedModel(self.model, architecture))
        self.objective = SearchObjective(student, masks, problem.limits, settings).to(self.device)
        plan = proportional_plan(problem)
        tuning = Tuning(architecture, architecture.rotates).to(self.device)
        narrowed = SelfDistillation(MaskedModel(self.model, architecture, tuning))
        narrow(narrowed.masked, source, plan)
        gates = hard_gates(plan, self.device)
        narrowed.masked.tuning.settle(gates.get(KEPT_HIDDEN))
        self.tune_objective = TuneObjective(
            narrowed, gates, 1.0, batch_size * seq_len, 0.0, settings
        )
        self.optimizer = self.objective.optimizer()
        self.tune_optimizer = self.tune_objective.optimizer()
        shape = (batch_size, seq_len)
        self.tokens = torch.randint(source.config.vocab_size, shape, device=self.device)
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[[], T], times: int = 1) -> T:
        """Runs a piece so many times and adds the mean of its seconds, device work included."""
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            result = work()
        self._wait()
        self.seconds.setdefault(name, []).append((time.perf_counter() - start) / times)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bare(self) -> Tensor:
        """Teacher forward, forward, loss and backward without anything of ours."""
        with torch.no_grad():
            self.model(input_ids=self.tokens, use_cache=False)
        embedded = self.model.get_input_embeddings()(self.tokens).detach().requires_grad_()
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        return loss

    def search_step(self) -> Tensor:
        """A whole step of the mask search."""
        loss = self._step(self.objective, self.optimizer, 0)
        self.objective.masked.set_gates(None)  # both stages' hooks are on the one network
        return loss

    def tune_step(self) -> Tensor:
        """A whole step of the tuning that follows."""
        loss = self._step(self.tune_objective, self.tune_optimizer, 1)
        self.tune_objective.masked.set_gates(None)
        return loss

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
        masked.set_gates(None)


@dataclass(frozen=True)
class StepTimes:
    """Medians of one model's steps.

    Attributes:
        num_params: of the model.
        num_tokens: in a step.
        seconds: by piece.
        ratios: of each to the bare pass of its round.
        utilisation: operations of a search step per second, as a share of the device's peak.
        peak: operations per second of a large matrix product.
    """

    num_params: int
    num_tokens: int
    seconds: dict[str, float]
    ratios: dict[str, float]
    utilisation: float
    peak: float


def step_times(
    name: str, batch_size: int, seq_len: int, dtype: torch.dtype, rounds: int, splits: bool = False
) -> StepTimes:
    """Times steps in turn, so that all see the same machine.

    Args:
        name: dense checkpoint.
        batch_size: windows.
        seq_len: tokens in each.
        dtype: to compute in.
        rounds: of all pieces.
        splits: whether the pieces of a search step are timed apart, too.
    """
    bench = Bench(name, batch_size, seq_len, dtype)
    for _ in range(2):  # warm-up
        bench.bare()
        bench.search_step()
        bench.tune_step()
    peak = peak_operations(bench.device, dtype)
    for _ in range(rounds):
        bench.timed("bare", bench.bare)
        bench.timed("search step", bench.search_step)
        bench.timed("tune step", bench.tune_step, EVERY)  # not all cost the same
        if splits:
            bench.pieces()
    middle = {name: median(times) for name, times in bench.seconds.items()}
    bare = bench.seconds["bare"]
    ratios = {
        name: median(time / one for time, one in zip(times, bare, strict=True))
        for name, times in bench.seconds.items()
    }
    rate = bench.operations / middle["search step"]
    return StepTimes(bench.num_params, batch_size * seq_len, middle, ratios, rate / peak, peak)


def peak_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    size = PEAK_SIZE[device.type]
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * median_ms(lambda: one @ other, device.type == "cuda"))
