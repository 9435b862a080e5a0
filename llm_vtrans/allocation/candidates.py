"""ALLOCATE, refined: plans that benefit ranks close to the best, compared by what they lose.

The benefit of a plan is a first-order estimate around the expected model; the loss of the
hard-masked network is the truth, and a forward pass of a few batches tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan, allocate, allocate_scores, scores_and_gates
from llm_vtrans.basis.oblique import ObliqueBasis
from llm_vtrans.budget.problem import TOLERANCE, Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Axis, Place
from llm_vtrans.masking.masks import VIBMasks

HIDDEN_RATIOS = (0.92, 1.08)  # of the sizes of largest benefit
HEADS_RATIOS = (0.85, 1.15)
NUM_TRIED = 16  # hidden sizes at which a plan that uses the budget is looked for
ALIKE = 0.04  # sizes this close: half of a step between hidden sizes
BETWEEN = (0.25, 0.5, 0.75)  # of the way from them to the hidden size that meets the budget alone

Found = tuple[PrunePlan, float]  # with its loss


def candidates(
    masks: VIBMasks, problem: Problem, oblique: ObliqueBasis | None = None
) -> Iterator[PrunePlan]:
    """The plan of largest benefit first, then its neighbours within the same budget.

    Neighbours have another hidden size, in the stock layout another number of heads, or
    keep the layers that the masks would remove; FFN units make up for it. With an oblique basis
    all come with as many dimensions of that basis in place of their own. It makes hidden
    dimensions cheaper to remove than the masks found them, so there are also the plan that
    removes them alone and those on the way to it.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.
        oblique: of the stream, where the family allows another basis.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    best, *neighbours = _neighbours(masks, problem)
    yield best
    if oblique is None or Axis.HIDDEN not in masks.names():
        yield from neighbours
        return
    maps = cache(oblique.maps)  # candidates share sizes
    for plan in (best, *neighbours, *_towards_hidden_alone(best, masks, problem)):
        yield _in_basis(plan, maps(plan.shape.hidden))


def _towards_hidden_alone(
    best: PrunePlan, masks: VIBMasks, problem: Problem
) -> Iterator[PrunePlan]:
    """Only hidden dimensions go, the later ones, and some layers; and plans between.

    What stays whole keeps its weights as they are: gates were trained for units that go.
    """
    size = problem.architecture.num_units[Axis.HIDDEN]
    order = torch.linspace(1, 0, size, dtype=torch.float64)
    scores, gate = scores_and_gates(masks)
    units = {name: score for name, score in scores.items() if name != "layers"}
    allowed = problem.counts(Axis.HIDDEN, True)
    sizes = []
    for layers in _depths(scores, best):
        try:
            alone = allocate_scores({Axis.HIDDEN: order, **layers}, {}, problem)
        except UserError:  # not with hidden dimensions alone
            continue
        sizes.append(alone.shape.hidden)
        if _is_full(alone, best, problem):
            yield alone
        for count in [count for count in allowed if count > sizes[-1]][:1]:
            yield from _of_sizes({Axis.HIDDEN: count}, [{**units, **layers}], {}, best, problem)
    for share in BETWEEN if sizes else ():
        wanted = best.shape.hidden + share * (sizes[0] - best.shape.hidden)
        near = min(allowed, key=lambda count: abs(count - wanted))
        yield from _of_sizes({Axis.HIDDEN: near}, _ways(scores, best), gate, best, problem)


def _depths(scores: dict[str, Tensor], best: PrunePlan) -> Iterator[dict[str, Tensor]]:
    """Scores that keep all layers, or let about as many of them go as the best plan does.

    Those of lowest score go, or in place of the last of them the next one: layers that can be
    spared are few, and their scores close.
    """
    yield {}
    if "layers" not in scores:
        return
    layers = scores["layers"]
    order = layers[1:].flatten().argsort() + layers.shape[1]  # the first layer stays
    num_gone = layers.numel() - int(_kept_layers(layers, best).sum())
    for num in range(max(1, num_gone - 1), min(num_gone + 1, len(order) - 1) + 1):
        for gone in (order[:num], torch.cat([order[: num - 1], order[num : num + 1]])):
            kept = torch.ones(layers.numel(), dtype=layers.dtype).index_fill(0, gone, 0)
            yield {"layers": kept.view_as(layers)}


def _kept_layers(layers: Tensor, plan: PrunePlan) -> Tensor:
    """Which layers, `(L, 1)`, or sub-layers, `(L, 2)`, a plan keeps, as these scores are shaped."""
    return plan.present if layers.shape[1] == 2 else plan.present.any(1, keepdim=True)


def _in_basis(plan: PrunePlan, maps: Mapping[Place, Tensor]) -> PrunePlan:
    keep = torch.arange(len(plan.keep[Axis.HIDDEN])) < plan.shape.hidden
    return replace(
        plan,
        keep={**plan.keep, Axis.HIDDEN: keep},
        gate={**plan.gate, Axis.HIDDEN: torch.ones(len(keep))},
        maps=maps,
    )


def _neighbours(masks: VIBMasks, problem: Problem) -> Iterator[PrunePlan]:
    scores, gate = scores_and_gates(masks)
    best = allocate_scores(scores, gate, problem)
    yield best
    sizes = _near(problem, Axis.HIDDEN, best.shape.hidden, HIDDEN_RATIOS, scores)
    heads = _near(problem, Axis.HEADS, max(best.shape.heads), HEADS_RATIOS, scores)
    for size, num_heads in product(sizes, heads if problem.is_uniform else [None]):
        fixed = {Axis.HIDDEN: size}
        if num_heads is not None:
            fixed[Axis.HEADS] = num_heads
        yield from _of_sizes(fixed, _ways(scores, best), gate, best, problem)


def _ways(scores: dict[str, Tensor], best: PrunePlan) -> list[dict[str, Tensor]]:
    """The scores, and where they remove layers the same without."""
    if bool(best.present.all()) or len(scores) == 1:
        return [scores]
    return [scores, {name: score for name, score in scores.items() if name != "layers"}]


def _one_layer_fewer(scores: dict[str, Tensor], best: PrunePlan) -> Iterator[dict[str, Tensor]]:
    """The scores when the layer, or sub-layer, of lowest score goes, too; never the first."""
    if "layers" not in scores or not bool(best.present[1:].any()):
        return
    layers = scores["layers"].clone()
    left = layers.masked_fill(~_kept_layers(layers, best), torch.inf)
    left[0] = torch.inf
    layers.view(-1)[left.argmin()] = 0
    yield {**scores, "layers": layers}


def _of_sizes(
    fixed: dict[Axis, int],
    ways: Iterable[dict[str, Tensor]],
    gate: dict[str, Tensor],
    best: PrunePlan,
    problem: Problem,
) -> Iterator[PrunePlan]:
    """Plans with these sizes, one for each way to score units, that use the budget."""
    for way in ways:
        with suppress(UserError):  # these sizes may not fit the budget
            plan = allocate_scores(way, gate, replace(problem, fixed=fixed))
            if plan.shape != best.shape and _is_full(plan, best, problem):
                yield plan


def _is_full(plan: PrunePlan, best: PrunePlan, problem: Problem) -> bool:
    """Whether a plan uses the budget as well as the best, or as exactly as is promised."""
    return problem.used(plan.shape) >= min(problem.used(best.shape), 1 - TOLERANCE)


def _near(
    problem: Problem, axis: Axis, count: int, ratios: tuple[float, ...], pruned: Container[str]
) -> list[int]:
    """Allowed numbers of units near these multiples of `count`, at least the next ones."""
    allowed = problem.counts(axis, axis in pruned)
    place = min(range(len(allowed)), key=lambda i: abs(allowed[i] - count))
    found = {allowed[place]}
    for ratio in ratios:
        near = min(range(len(allowed)), key=lambda i: abs(allowed[i] - ratio * count))
        if near == place:
            near += 1 if ratio > 1 else -1
        if 0 <= near < len(allowed):
            found.add(allowed[near])
    return sorted(found)


def shortlist(
    masks: VIBMasks,
    problem: Problem,
    loss: Callable[[PrunePlan], float],
    oblique: ObliqueBasis | None = None,
    num: int = 1,
) -> list[Found]:
    """The plans of lowest loss, the lowest first, and these losses.

    They are candidates, or what lies beyond the best of them and loses less still.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.
        loss: of the hard-masked network, lower is better.
        oblique: of the stream, where the family allows another basis.
        num: how many at most, no two alike.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    best = _Shortlist(loss, num)
    best.improves(candidates(masks, problem, oblique))
    if Axis.HIDDEN in masks.names():
        guess = allocate(masks, problem)
        for ratio in HIDDEN_RATIOS:
            while best.improves(_beyond(best.first, ratio, guess, masks, problem, oblique)):
                pass
    return best.found


class _Shortlist:
    """The plans of lowest loss so far, no two alike; the others are forgotten.

    Plans nearly the same lose nearly the same, before any training and after it.
    """

    def __init__(self, loss: Callable[[PrunePlan], float], num: int):
        self._loss, self._num = loss, num
        self.found: list[Found] = []

    @property
    def first(self) -> PrunePlan:
        """The plan of lowest loss."""
        return self.found[0][0]

    def improves(self, plans: Iterable[PrunePlan]) -> bool:
        """Whether one of these loses less than all before."""
        least = self.found[0][1] if self.found else torch.inf
        for plan in plans:
            ranked = sorted([*self.found, (plan, self._loss(plan))], key=lambda entry: entry[1])
            self.found = []
            for entry in ranked:
                if not any(_alike(entry[0], better) for better, _ in self.found):
                    self.found.append(entry)
            del self.found[self._num :]
        return self.found[0][1] < least


def _alike(one: PrunePlan, other: PrunePlan) -> bool:
    """Whether the same sub-layers stay, of about the same sizes; FFN units fill the budget."""
    return bool((one.present == other.present).all()) and all(
        abs(count - another) <= ALIKE * max(count, another)
        for count, another in zip(_sizes(one), _sizes(other), strict=True)
    )


def _sizes(plan: PrunePlan) -> tuple[int, int]:
    return plan.shape.hidden, sum(plan.shape.heads)


def _beyond(
    plan: PrunePlan,
    ratio: float,
    guess: PrunePlan,
    masks: VIBMasks,
    problem: Problem,
    oblique: ObliqueBasis | None,
) -> list[PrunePlan]:
    """Plans of about `ratio` times this one's hidden size, in the oblique basis if there is one.

    The masks may have settled far from the best balance of hidden dimensions, layers and units.
    `guess` is the plan that they propose.
    """
    size = plan.shape.hidden
    scores, gate = scores_and_gates(masks)
    ways = [*_ways(scores, guess), *_one_layer_fewer(scores, guess)]
    allowed = problem.counts(Axis.HIDDEN, True)
    further = [count for count in allowed if (count > size if ratio > 1 else count < size)]
    further.sort(key=lambda count: abs(count - ratio * size))
    for count in further[:NUM_TRIED]:
        if plans := list(_of_sizes({Axis.HIDDEN: count}, ways, gate, guess, problem)):
            if oblique is None:
                return plans
            maps = oblique.maps(count)
            return [_in_basis(plan, maps) for plan in plans]
    return []
