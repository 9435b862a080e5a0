"""ALLOCATE, refined: plans that benefit ranks close to the best, at any depth.

The benefit of a plan is a first-order estimate around the expected model. It says little about
how many layers to keep, so there are plans for every set of layers that comes into question.

The masks' `mu` makes good what one budget takes away. With more units, or in a better basis, less
is to be made good, with fewer of them more: so how strong the gates are is looked for, too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import Allocator, PrunePlan, goes_whole, scores_and_gates
from llm_vtrans.basis.oblique import AnyBasis
from llm_vtrans.budget.problem import TOLERANCE, Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Axis, Place, Shape
from llm_vtrans.masking.masks import VIBMasks

HIDDEN_RATIOS = (0.92, 1.08)  # of the sizes of largest benefit
HEADS_RATIOS = (0.85, 1.15)
NUM_TRIED = 16  # hidden sizes at which a plan that uses the budget is looked for
BETWEEN = (0.25, 0.5, 0.75)  # of the way from them to the hidden size that meets the budget alone
SLACK = 0.01  # of a budget may stay unused rather than that a plan becomes another one
WHOLE, TRAINED = 0.0, 1.0  # strengths of gates: units as they are, and as masks have them
STRENGTH_STEPS = (-0.25, 0.25)


@dataclass(frozen=True)
class Fit:
    """What a plan is to be fitted to.

    Attributes:
        plan: of another problem; the new one is to be like it.
        problem: the new one.
        hidden: size that is wanted; one near it where that uses the budget better.
        heads: number that is wanted in every layer, in the stock layout.
    """

    plan: PrunePlan
    problem: Problem
    hidden: float
    heads: float


class Candidates:
    """Plans within a budget; all use it as well as the first, or as exactly as is promised.

    With an oblique basis all but the first come with as many dimensions of that basis in place of
    their own; the first too where a tied head allows no other.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.
        oblique: of the stream, where the family allows another basis.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """

    def __init__(self, masks: VIBMasks, problem: Problem, oblique: AnyBasis | None = None):
        self._scores, gate = scores_and_gates(masks)
        self._problem = problem
        self._allocator = Allocator(self._scores, gate, problem)
        self._maps = None
        if oblique is not None and Axis.HIDDEN in self._scores:
            self._maps = lru_cache(4)(oblique.maps)
        self.first = self._allocator.plan()
        self._full = min(problem.used(self.first.shape), 1 - TOLERANCE)
        self._mu = self.first.gate
        if oblique is not None and oblique.is_needed:
            self.first = self._in_basis(self.first)

    @cached_property
    def _sizes(self) -> list[int]:
        return self._problem.counts(Axis.HIDDEN, Axis.HIDDEN in self._scores)

    @cached_property
    def _hidden_alone(self) -> Allocator:
        """Of plans without hidden dimensions, the later ones."""
        order = torch.linspace(1, 0, max(self._sizes), dtype=torch.float64)
        return Allocator({Axis.HIDDEN: order}, {}, self._problem)

    def depths(self, plan: PrunePlan) -> Iterator[Tensor]:
        """Sub-layers to keep, `(L, 2)` bool: the plan's, all, or about as many as it has."""
        yield plan.present
        if "layers" not in self._scores:
            return
        num_gone = self._num_gone(plan)
        for num in range(max(1, num_gone - 1), num_gone + 2):
            yield from self._without(num)
        yield from self._without(0)

    def deeper(self, plan: PrunePlan) -> Iterator[Tensor]:
        """Sub-layers to keep, `(L, 2)` bool: a layer more than a plan has, or a sub-layer."""
        if "layers" in self._scores and not bool(plan.present.all()):
            yield from self._without(self._num_gone(plan) - 1)

    def _num_gone(self, plan: PrunePlan) -> int:
        """Layers that a plan lacks, or sub-layers where these go one by one."""
        kept = plan.present.any(1) if goes_whole(self._scores) else plan.present
        return int((~kept).sum())

    def _without(self, num: int) -> Iterator[Tensor]:
        """Those of lowest score go, or in place of the last of them the next one.

        Layers that can be spared are few, and their scores close. The first layer stays.
        """
        layers = self._scores["layers"]
        order = layers[1:].flatten().argsort(stable=True) + layers.shape[1]
        if num >= len(order):
            return
        choices = [order[:num]]
        if num > 0:
            choices.append(torch.cat([order[: num - 1], order[num : num + 1]]))
        for gone in choices:
            rest = torch.ones(layers.numel(), dtype=torch.bool).index_fill(0, gone, False)
            yield rest.view_as(layers).expand(len(layers), 2)

    def of(self, kept: Tensor) -> Iterator[PrunePlan]:
        """What represents a depth: its plan of largest benefit, and the extreme one."""
        with suppress(UserError):  # so many layers may not fit the budget
            wanted = self._allocator.plan(kept).shape.hidden
            yield from self._gated(self._nearest(wanted, kept), TRAINED, WHOLE)
        if self._maps is not None:
            yield from self._gated(self._extreme(kept), WHOLE)

    def around(self, plan: PrunePlan) -> Iterator[PrunePlan]:
        """Neighbours of the same depth: another hidden size, another number of heads.

        FFN units make up for it. An oblique basis makes hidden dimensions cheaper to remove than
        the masks found them, so there are also plans on the way to removing them alone.
        """
        hidden, heads = plan.shape.hidden, max(plan.shape.heads)
        numbers: list[int | None] = [None]
        if self._problem.is_uniform and Axis.HEADS in self._scores:
            allowed = self._problem.counts(Axis.HEADS, True)
            numbers += _near(allowed, heads, HEADS_RATIOS)
        for size in _near(self._sizes, hidden, HIDDEN_RATIOS):
            for number in numbers:
                yield from self._gated(self._nearest(size, plan.present, number), plan.strength)
        for alone in self._extreme(plan.present) if self._maps is not None else ():
            for share in BETWEEN:
                wanted = hidden + share * (alone.shape.hidden - hidden)
                found = self._nearest(wanted, plan.present)
                yield from self._gated(found, *sorted({WHOLE, plan.strength}))

    def beyond(self, plan: PrunePlan, ratio: float) -> Iterator[PrunePlan]:
        """The plan of the same depth of about `ratio` times this one's hidden size."""
        size = plan.shape.hidden
        further = [n for n in self._sizes if (n > size if ratio > 1 else n < size)]
        found = self._nearest(ratio * size, plan.present, sizes=further)
        yield from self._gated(found, plan.strength)

    def fitted(self, fit: Fit) -> Iterator[PrunePlan]:
        """A plan for this budget: FFN units make up for what is wanted, or hidden dimensions.

        Where neither can, in the stock layout the number of heads does; where nothing can, it is
        the plan within the budget that comes near. Layers and strength stay.

        Args:
            fit: to this problem.
        """
        plan = fit.plan
        numbers: list[int | None] = [None]
        if self._problem.is_uniform and Axis.HEADS in self._scores:
            allowed = self._problem.counts(Axis.HEADS, True)
            numbers = [*sorted(allowed, key=lambda number: abs(number - fit.heads))]

        def plans(*sizes: float, number: int | None, least: float) -> Iterator[PrunePlan]:
            for size in (*sizes, self._filling(plan.shape, number)):
                found = self._nearest(size, plan.present, number, least=least)
                yield from self._gated(found, plan.strength)

        first, *others = numbers
        found = [*plans(fit.hidden, number=first, least=1 - SLACK)]
        for number in others:
            found = found or [*plans(number=number, least=1 - SLACK)]
        yield from found or plans(number=first, least=0.0)

    def _filling(self, shape: Shape, number: int | None) -> int:
        """The largest hidden size at which a shape of so many heads keeps the budget."""
        heads = shape.heads if number is None else tuple(number * (n > 0) for n in shape.heads)

        def used(size: int) -> float:
            return self._problem.used(replace(shape, hidden=size, heads=heads))

        return self._sizes[max(0, bisect_right(self._sizes, 1.0, key=used) - 1)]

    def stronger(self, plan: PrunePlan, by: float) -> Iterator[PrunePlan]:
        """The same units with stronger gates, or weaker ones for less than zero."""
        if plan.strength + by >= WHOLE:
            yield from self._gated([plan], plan.strength + by)

    def _gated(self, plans: Iterable[PrunePlan], *strengths: float) -> Iterator[PrunePlan]:
        """Every plan with gates of every strength; a basis of its own keeps the ones it has."""
        for plan in plans:
            for strength in strengths:
                gate = {name: 1 + strength * (mu - 1) for name, mu in self._mu.items()}
                if plan.maps is not None:
                    gate[Axis.HIDDEN.value] = plan.gate[Axis.HIDDEN]
                yield replace(plan, gate=gate, strength=strength)

    def _nearest(
        self,
        wanted: float,
        kept: Tensor,
        num_heads: int | None = None,
        sizes: list[int] | None = None,
        least: float | None = None,
    ) -> Iterator[PrunePlan]:
        """The plan that uses the budget whose hidden size is closest to that wanted, if any."""
        least = self._full if least is None else least
        allowed = self._sizes if sizes is None else sizes
        for size in sorted(allowed, key=lambda size: abs(size - wanted))[:NUM_TRIED]:
            fixed = {Axis.HIDDEN: size}
            if num_heads is not None:
                fixed[Axis.HEADS] = num_heads
            with suppress(UserError):  # these sizes may not fit the budget
                plan = self._allocator.plan(kept, fixed)
                if self._problem.used(plan.shape) >= least:
                    yield self._in_basis(plan)
                    return

    def _extreme(self, kept: Tensor) -> Iterator[PrunePlan]:
        """Only hidden dimensions go, apart from layers; or a few units, too."""
        with suppress(UserError):  # not with hidden dimensions alone
            alone = self._hidden_alone.plan(kept)
            if self._problem.used(alone.shape) >= self._full:
                yield self._in_basis(alone)
            size = alone.shape.hidden
            yield from self._nearest(size, kept, sizes=[n for n in self._sizes if n > size])

    def _in_basis(self, plan: PrunePlan) -> PrunePlan:
        if self._maps is None:
            return plan
        maps: Mapping[Place, Tensor] = self._maps(plan.shape.hidden)
        keep = torch.arange(len(plan.keep[Axis.HIDDEN])) < plan.shape.hidden
        return replace(
            plan,
            keep={**plan.keep, Axis.HIDDEN: keep},
            gate={**plan.gate, Axis.HIDDEN: torch.ones(len(keep))},
            maps=maps,
        )


def _near(allowed: list[int], count: int, ratios: tuple[float, ...]) -> list[int]:
    """This number of units and those near its multiples, at least the next ones."""
    place = min(range(len(allowed)), key=lambda i: abs(allowed[i] - count))
    found = {allowed[place]}
    for ratio in ratios:
        near = min(range(len(allowed)), key=lambda i: abs(allowed[i] - ratio * count))
        if near == place:
            near += 1 if ratio > 1 else -1
        if 0 <= near < len(allowed):
            found.add(allowed[near])
    return sorted(found)
