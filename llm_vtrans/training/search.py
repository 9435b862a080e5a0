"""SEARCH: VIB masks learn, under the budget, which units the network can spare."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_vtrans.budget.cost import Lagrangian, Limit, complete
from llm_vtrans.families.base import Architecture, Axis
from llm_vtrans.masking.by_layer import presence
from llm_vtrans.masking.masks import SHARPNESS, VIBMasks, keep_probability
from llm_vtrans.tasks.encoding import Batch
from llm_vtrans.training.distillation import Distillation
from llm_vtrans.training.loop import Objective, TrainingSettings
from llm_vtrans.training.shrinking import Shrinker

INITIAL_LOG_VAR = -4.0  # where that surrogate has a gradient from the first step on
CUBIC_SHARE = 0.5  # of the steps: then the masks settle at the budget


class SearchObjective(Objective):
    """Loss of one micro-batch: distillation, KL of the masks, penalty of the budget.

    Args:
        distillation: masked model and teacher.
        masks: the trained gates.
        limits: budgets; the one that is furthest from its target drives the masks.
        settings: of the loop.
        shrinker: takes out what the masks give up; None keeps the network whole.
    """

    def __init__(
        self,
        distillation: Distillation,
        masks: VIBMasks,
        limits: tuple[Limit, ...],
        settings: TrainingSettings,
        shrinker: Shrinker | None = None,
    ):
        super().__init__()
        self.distillation, self.masked = distillation, distillation.masked
        self.tuning, self.masks = self.masked.tuning, masks
        self.limits, self.settings, self.shrinker = limits, settings, shrinker
        self.tuning.requires_grad_(False)  # its stage comes later
        self.lagrangian = Lagrangian().to(next(masks.parameters()).device)
        self.stage = range(settings.search_steps)
        self._starts = self._initial_sparsity().tolist()

    def forward(self, batch: Batch, micro_batch: int, step: int) -> dict[str, Tensor]:
        """Loss terms, each of shape `()`; computing them never waits for the device.

        Args:
            batch: tokens `(batch, seq)` and what else the model takes.
            micro_batch: global number of this micro-batch; with the seed it decides the noise.
            step: global step.
        """
        architecture = self.masked.architecture
        generator = torch.Generator(batch["input_ids"].device)
        generator.manual_seed(self.settings.seed * 1_000_003 + micro_batch)
        gates = complete_layers(self.masks.sample(generator), architecture)
        there = presence(self.masks.keep_probability(SHARPNESS[1]), architecture.num_layers)
        terms = self.distillation(batch, {**gates, **there})
        keep = self.masks.keep_probability(sharpness_at(self.progress(step)))
        sparsity = self.expected_sparsity(keep)
        target = torch.stack([sparsity.new_full((), share) for share in self.targets(step)])
        residual, binding = (sparsity - target).min(dim=0)
        penalty = self.lagrangian(residual)
        kl = self.masks.kl(dict.fromkeys(self.masks.names(), 1.0))
        if self.shrinker is not None:
            terms = {**terms, "removed": sparsity.new_full((), self.shrinker.removed)}
        return {
            **terms,
            "loss": terms["loss"] + self.settings.kl_weight * kl + penalty,
            "kl": kl,
            "penalty": penalty,
            "sparsity": sparsity.take(binding),
            "target": target.take(binding),
            "multiplier": self.lagrangian.multiplier,
        }

    def targets(self, step: int) -> list[float]:
        """Sparsity aimed at in a global step, for every limit."""
        return [
            target_at(step, len(self.stage), start, limit.budget.sparsity, self.settings.schedule)
            for start, limit in zip(self._starts, self.limits, strict=True)
        ]

    def expected_sparsity(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Share of every limit's dense cost that goes if units stay with these probabilities.

        Returns:
            Shape `(num_limits,)`.
        """
        full = complete(keep, self.masked.architecture)
        kept = [
            limit.cost.expected(full, self.settings.is_uniform) / limit.budget.dense
            for limit in self.limits
        ]
        return 1 - torch.stack(kept)

    @torch.no_grad()
    def _initial_sparsity(self) -> Tensor:
        """Expected sparsity of fresh masks: where the target's warm-up begins.

        Computed from the initial values and not the current ones, so that it is the same
        after a resume.
        """
        keep = {
            name: keep_probability(torch.full_like(mu, INITIAL_LOG_VAR), SHARPNESS[0])
            for name, mu in self.masks.mu.items()
        }
        return self.expected_sparsity(keep)

    def optimizer(self) -> torch.optim.AdamW:
        """Minimises over masks and student and maximises over the multiplier."""
        masks = {"params": list(self.masks.parameters()), "peak": self.settings.learning_rate}
        groups = [self.lagrangian.parameter_group(), masks, *self.distillation.parameter_groups()]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def record(self) -> dict[str, Tensor]:
        """Which units are left in the network."""
        return {} if self.shrinker is None else self.shrinker.state()

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Lets all rates decay linearly to zero but the multiplier's; shrinks when due."""
        if self.shrinker is not None:
            self.shrinker.step(step, self.masks, optimizer)
        for group in optimizer.param_groups:
            if "peak" in group:
                group["lr"] = group["peak"] * (1 - self.progress(step))


def complete_layers(gates: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Broadcasts a whole-layer gate `(L, 1)` to both sub-layers."""
    if "layers" not in gates:
        return gates
    return {**gates, "layers": gates["layers"].expand(architecture.num_layers, 2)}


def sharpness_at(progress: float) -> float:
    """Sharpness of the keep probability after a share of the stage."""
    first, last = SHARPNESS
    return first * (last / first) ** progress


def target_at(step: int, num_steps: int, start: float, target: float, schedule: str) -> float:
    """Sparsity aimed at: from where training starts to the budget, then constant.

    Args:
        step: of the stage.
        num_steps: of the stage.
        start: sparsity in step 0.
        target: the budget's.
        schedule: `linear` warms up over 10% of the steps, 20% above 60% sparsity (METHOD,
            section 3); `cubic` over half of them, fast at first and ever slower (Zhu and Gupta,
            arXiv:1710.01878, equation 1).
    """
    if schedule == "cubic":
        left = max(0.0, 1 - step / max(1, math.ceil(num_steps * CUBIC_SHARE)))
        return target + (start - target) * left**3
    warmup = max(1, math.ceil(num_steps * (0.2 if target > 0.6 else 0.1)))
    return start + (target - start) * min(1.0, step / warmup)


def initial_shapes(
    architecture: Architecture, prune: tuple[str, ...], is_uniform: bool
) -> dict[str, tuple[int, ...]]:
    """Mask shapes of the structures to prune; in the stock layout layers go as a whole."""
    layers, units = architecture.num_layers, architecture.num_units
    shapes = {
        Axis.HIDDEN.value: (units[Axis.HIDDEN],),
        Axis.HEADS.value: (layers, units[Axis.HEADS]),
        Axis.FFN.value: (layers, units[Axis.FFN]),
        "layers": (layers, 1 if is_uniform else 2),
    }
    return {name: shapes[name] for name in prune}
