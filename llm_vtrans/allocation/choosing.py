"""ALLOCATE, measured: candidates are compared by what their hard-masked networks lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.candidates import Candidates, Fit
from llm_vtrans.allocation.plan_search import search_plan
from llm_vtrans.basis.head_basis import HeadBasis
from llm_vtrans.basis.oblique import AnyBasis
from llm_vtrans.budget.problem import Problem
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.families.base import Shape
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.tasks.encoding import Batch
from llm_vtrans.training.distillation import Distillation
from llm_vtrans.training.regression import fit_readers
from llm_vtrans.training.rehearsal import Rehearsal


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
        oblique: AnyBasis | None,
        head_basis: HeadBasis | None,
    ):
        self._distillation, self._masks = distillation, masks
        self._taught = [(batch, distillation.teach(batch)) for batch in batches]
        self._oblique, self._head_basis = oblique, head_basis

    def choose(self, problem: Problem, rehearsal: Rehearsal | None = None) -> PrunePlan:
        """The plan of least loss.

        Args:
            problem: model, budget, rounding and layout.
            rehearsal: of the tuning that follows, for the last word; None where none does.

        Raises:
            UserError: even the smallest allowed model exceeds the budget.
        """
        tuned = () if rehearsal is None else (partial(self.rehearsed, rehearsal), rehearsal.most)
        plan = search_plan(self._masks, problem, self.loss, self._oblique, *tuned)
        return replace(plan, basis=self._head_basis)

    def refit(self, fits: Sequence[Fit], known: Sequence[Shape]) -> PrunePlan | None:
        """The plan of least loss that fits something and is none of some shapes, if there is one.

        Raises:
            UserError: even the smallest allowed model exceeds a budget.
        """
        found = (
            plan
            for fit in fits
            for plan in Candidates(self._masks, fit.problem, self._oblique).fitted(fit)
            if plan.shape not in known
        )
        best = min(found, key=self.loss, default=None)
        return None if best is None else replace(best, basis=self._head_basis)

    def rehearsed(self, rehearsal: Rehearsal, plan: PrunePlan) -> float:
        """What a plan loses after the first steps of tuning, in nats."""
        plan = replace(plan, basis=self._head_basis)
        self._start(plan)
        rehearsal.tune(self._distillation, self._gates(plan), self.measured())
        loss = self.measured()
        rehearsal.say(f"rehearsed: {plan.shape}  {loss:.4f} nats")
        return loss

    def fitted(self, plan: PrunePlan, batches: Sequence[Batch]) -> float:
        """What a plan loses when the closed-form part of tuning is done, in nats.

        The network is then as that leaves it, until gates or maps are set again.
        """
        self._start(plan)
        return fit_readers(self._distillation.masked, self._gates(plan), batches, self.measured)

    def _start(self, plan: PrunePlan) -> None:
        """Makes the network what tuning starts from."""
        self.use(plan)
        self._distillation.masked.tuning.is_on = True  # with the identity, where there are no maps

    def use(self, plan: PrunePlan) -> None:
        """Makes the network what a plan makes of it, until gates or maps are set again."""
        masked = self._distillation.masked
        masked.tuning.start(plan.maps)
        masked.set_gates(self._gates(plan))

    def _gates(self, plan: PrunePlan) -> dict[str, Tensor]:
        return hard_gates(plan, next(self._masks.parameters()).device)

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
