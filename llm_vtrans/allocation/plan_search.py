"""ALLOCATE, refined: candidates are compared by what their hard-masked networks lose.

A forward pass of a few batches tells it. But tuning makes good more of what went with hidden
dimensions than of what went with layers, heads and FFN units: a rehearsal of it has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf, isnan

from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.candidates import HIDDEN_RATIOS, STRENGTH_STEPS, Candidates
from llm_vtrans.basis.oblique import AnyBasis
from llm_vtrans.budget.problem import Problem
from llm_vtrans.families.base import Shape
from llm_vtrans.masking.masks import VIBMasks

NUM_EXPLORED = 3  # depths, of those that a search comes across at a time

Found = tuple[float, PrunePlan]  # a plan behind its loss


def search_plan(
    masks: VIBMasks,
    problem: Problem,
    loss: Callable[[PrunePlan], float],
    oblique: AnyBasis | None = None,
    tuned_loss: Callable[[PrunePlan], float] | None = None,
    most_tuned: float = inf,
) -> PrunePlan:
    """The plan of lowest loss that is found.

    The most promising depths are searched, each until neither a hidden size near its best plan's
    nor weaker or stronger gates lose less; those of about as many layers come in question then,
    and so on. At last hidden dimensions go for layers and for other units as long as a rehearsal of
    tuning leaves less of the loss.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.
        loss: of the hard-masked network, lower is better.
        oblique: of the stream, where the family allows another basis.
        tuned_loss: the same after a rehearsal of tuning, which takes longer; None if none follows.
        most_tuned: plans that may be rehearsed.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    candidates, best_of = Candidates(masks, problem, oblique), _Losses(loss)
    [best] = best_of([candidates.first])
    seen: list[Tensor] = []
    while True:
        found: list[Found] = []
        for kept in candidates.depths(best[1]):
            if not any(kept.equal(other) for other in seen):
                seen.append(kept)
                found += best_of(candidates.of(kept))
        if not found:
            break
        for start in sorted(found, key=_loss)[:NUM_EXPLORED]:
            best = min(best, _explore(start, candidates, best_of), key=_loss)
    if tuned_loss is None or most_tuned < 2:  # one alone tells nothing
        return best[1]
    return _settle(best[1], candidates, best_of, _Losses(tuned_loss, most_tuned))


def _loss(found: Found) -> float:
    return found[0]


class _Losses:
    """Losses of plans, each measured once, and of no more than so many."""

    def __init__(self, loss: Callable[[PrunePlan], float], most: float = inf):
        self._loss, self._most = loss, most
        self._known: dict[tuple[Shape, bool, float], float] = {}

    def __call__(self, plans: Iterable[PrunePlan]) -> list[Found]:
        """The one of lowest loss, if there is any; a loss that is no number is the highest."""
        best: list[Found] = []  # of a few dozen only one at a time: their maps take room
        for plan in plans:
            key = _key(plan)
            if key not in self._known:
                loss = self._loss(plan)
                self._known[key] = inf if isnan(loss) else loss
            best = [min([*best, (self._known[key], plan)], key=_loss)]
        return best

    def has_room(self, plans: Iterable[PrunePlan]) -> bool:
        """Whether all of these may be measured."""
        return len({*self._known, *map(_key, plans)}) <= self._most


def _key(plan: PrunePlan) -> tuple[Shape, bool, float]:
    """What tells plans of one search apart."""
    return plan.shape, plan.maps is None, plan.strength


def _explore(best: Found, candidates: Candidates, best_of: _Losses) -> Found:
    """Goes from a plan to the best of its depth, as far as single steps lead downhill."""
    steps = [
        *(partial(candidates.beyond, ratio=ratio) for ratio in HIDDEN_RATIOS),
        *(partial(candidates.stronger, by=by) for by in STRENGTH_STEPS),
    ]
    best = min([best, *best_of(candidates.around(best[1]))], key=_loss)
    is_better = True
    while is_better:
        is_better = False
        for step in steps:
            for found in best_of(step(best[1])):
                if found[0] < best[0]:
                    best, is_better = found, True
    return best


def _settle(
    plan: PrunePlan, candidates: Candidates, best_of: _Losses, best_tuned: _Losses
) -> PrunePlan:
    """Gives up more hidden dimensions while less is lost after a rehearsal.

    For more layers at first, then for more units in each of them.
    """
    for step in (_deeper, _narrower):
        while found := step(plan, candidates, best_of):
            [(_, other)] = found
            if not best_tuned.has_room([plan, other]):
                return plan
            [(_, better)] = best_tuned([plan, other])
            if better is plan:
                break
            plan = other
    return plan


def _deeper(plan: PrunePlan, candidates: Candidates, best_of: _Losses) -> list[Found]:
    """The best plan with a layer more."""
    found = best_of(other for kept in candidates.deeper(plan) for other in candidates.of(kept))
    return [_explore(start, candidates, best_of) for start in found]


def _narrower(plan: PrunePlan, candidates: Candidates, best_of: _Losses) -> list[Found]:
    """The best plan of the next smaller hidden size, with gates as strong, weaker or stronger."""

    def plans() -> Iterator[PrunePlan]:
        for other in candidates.beyond(plan, min(HIDDEN_RATIOS)):
            yield other
            for by in STRENGTH_STEPS:
                yield from candidates.stronger(other, by)

    return best_of(plans())
