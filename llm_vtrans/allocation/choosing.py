"""ALLOCATE, measured: candidates are compared by what their hard-masked networks lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.candidates import shortlist
from llm_vtrans.basis.head_basis import HeadBasis
from llm_vtrans.basis.oblique import ObliqueBasis
from llm_vtrans.budget.problem import Problem
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.tasks.encoding import Batch
from llm_vtrans.training.distillation import Distillation

NUM_REHEARSED = 4  # what a plan loses before tuning tells the best few, not which of them is best


class Chooser:
    """Picks plans for one network with trained masks.

    Args:
        distillation: masked network and teacher.
        masks: trained.
        batches: on which plans are compared, the same on every rank.
        oblique: another basis of the stream to try, where the family allows one.
        head_basis: of the heads, where not all of their dimensions are kept.
    """

    def __init__(
        self,
        distillation: Distillation,
        masks: VIBMasks,
        batches: Iterable[Batch],
        oblique: ObliqueBasis | None,
        head_basis: HeadBasis | None,
    ):
        self._distillation, self._masks = distillation, masks
        self._taught = [(batch, distillation.teach(batch)) for batch in batches]
        self._oblique, self._head_basis = oblique, head_basis

    def choose(
        self, problem: Problem, rehearse: Callable[[PrunePlan, float], None] | None = None
    ) -> PrunePlan:
        """The candidate of least loss.

        Args:
            problem: model, budget, rounding and layout.
            rehearse: trains a network that is made what a plan makes of it, which has a certain
                loss. The best few are compared by what they lose then: successive halving
                (arXiv:1502.07943).

        Raises:
            UserError: even the smallest allowed model exceeds the budget.
        """
        num = 1 if rehearse is None else NUM_REHEARSED
        found = shortlist(self._masks, problem, self.loss, self._oblique, num)
        plans = [(replace(plan, basis=self._head_basis), loss) for plan, loss in found]
        if rehearse is None or len(plans) == 1:
            return plans[0][0]
        losses = []
        for plan, loss in plans:
            self.use(plan)
            rehearse(plan, loss)
            losses.append(self.measured())
        return plans[losses.index(min(losses))][0]

    def use(self, plan: PrunePlan) -> None:
        """Makes the network what a plan makes of it, until gates or maps are set again."""
        masked = self._distillation.masked
        masked.tuning.start(plan.maps)
        masked.set_gates(hard_gates(plan, next(self._masks.parameters()).device))

    def loss(self, plan: PrunePlan) -> float:
        """Distillation loss of the hard-masked network, a mean over the batches in nats."""
        self.use(replace(plan, basis=self._head_basis))
        return self.measured()

    @torch.no_grad()
    def measured(self) -> float:
        """The same of the network as it is."""
        return agreed(fmean(float(self._distillation.loss(*pair)) for pair in self._taught))


def hard_gates(plan: PrunePlan, device: torch.device) -> dict[str, Tensor]:
    """What the masked network multiplies by when a plan is fixed."""
    return {name: gate.to(device) for name, gate in plan.hard().items()}
