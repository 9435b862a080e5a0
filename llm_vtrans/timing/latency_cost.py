"""A latency budget: times measured on the device stand where counts stand for other budgets.

A table of a few networks of the family, timed on the device, gives what a head, an FFN unit, a
sub-layer and all outside the layers take at some hidden sizes; between those it is
interpolated, so that the same search and the same choice of a shape serve all budgets. Hardware
does not keep to any table, so the chosen shape itself is timed, and the table corrected by
what was found, until that shape keeps the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.budget.cost import Cost, dense_shape
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Architecture, Axis, Shape, Sublayer

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the hidden size: where the table is measured
DEPTH = 3  # layers of the networks in it
LEAST = 1e-3  # ns that a unit takes at least: timing noise must not make it a gain
AIM, NEAR = 0.985, 0.015  # of the time allowed, and as much beside it is what was aimed at
CHOICES, FITS = 2, 6  # rounds of timing and correcting, where all is chosen and where little is

Measure = Callable[[Shape], float]  # nanoseconds of a network


@dataclass(frozen=True)
class Times:
    """Nanoseconds at one hidden size.

    Attributes:
        outside: all but the layers.
        bases: of a sub-layer whatever units it has.
        units: of one of its units.
    """

    outside: float
    bases: tuple[float, float]
    units: tuple[float, float]


@dataclass(frozen=True)
class LatencyCost(Cost):
    """Nanoseconds of a pass.

    Attributes:
        sizes: hidden sizes that were measured, ascending.
        times: at each of them.
        head_dim: dimensions of a head in the table, if it may lose some.
        factor: what the table is corrected by.
    """

    sizes: tuple[int, ...]
    times: tuple[Times, ...]
    head_dim: int | None = None
    factor: float = 1.0

    def outside(self, hidden: Any) -> Any:
        """As `Cost.outside`, in nanoseconds."""
        return self._at([times.outside for times in self.times], hidden)

    def part(self, sublayer: Sublayer, hidden: Any, units: Any, head_dim: Any = None) -> Any:
        """As `Cost.part`, in nanoseconds; a head takes time by its dimensions."""
        index = sublayer.order
        if sublayer is Sublayer.ATTENTION and head_dim is not None and self.head_dim is not None:
            units = units * head_dim / self.head_dim
        base = self._at([times.bases[index] for times in self.times], hidden)
        return base + units * self._at([times.units[index] for times in self.times], hidden)

    def corrected(self, shape: Shape, found: float) -> LatencyCost:
        """The same times in proportion, such that this shape takes what was found."""
        return replace(self, factor=self.factor * found / self.of(shape))

    def _at(self, values: list[float], hidden: Any) -> Any:
        """Linear between the measured sizes, and on from the first two below them."""
        at = torch.as_tensor(hidden)
        sizes = torch.tensor(self.sizes, dtype=torch.float64, device=at.device)
        known = self.factor * torch.tensor(values, dtype=torch.float64, device=at.device)
        if len(sizes) == 1:
            found = known[0].expand(at.shape)
        else:
            right = torch.searchsorted(sizes, at.detach().double()).clamp(1, len(sizes) - 1)
            slope = (known[right] - known[right - 1]) / (sizes[right] - sizes[right - 1])
            found = (known[right] + slope * (at - sizes[right])).clamp(min=LEAST)
        return found if isinstance(hidden, torch.Tensor) else float(found)


def latency_cost(architecture: Architecture, sizes: list[int], measure: Measure) -> LatencyCost:
    """Times networks of a few shapes; what a unit takes is the difference that it makes.

    Args:
        architecture: of the dense model.
        sizes: hidden sizes to measure at, ascending, the last one the dense model's.
        measure: times a network of a shape in the per-layer layout.
    """
    times = accumulate((_times(architecture, size, measure) for size in sizes), _at_least)
    cost = LatencyCost(tuple(sizes), tuple(times), architecture.head_dim)
    dense = dense_shape(architecture)
    return cost.corrected(dense, measure(dense))


def _at_least(smaller: Times, larger: Times) -> Times:
    """A wider network's times, which noise may not let fall below a narrower one's."""
    return Times(
        max(smaller.outside, larger.outside),
        (max(smaller.bases[0], larger.bases[0]), max(smaller.bases[1], larger.bases[1])),
        (max(smaller.units[0], larger.units[0]), max(smaller.units[1], larger.units[1])),
    )


def _times(architecture: Architecture, hidden: int, measure: Measure) -> Times:
    layers, units = architecture.num_layers, architecture.num_units
    heads, ffn, depth = units[Axis.HEADS], units[Axis.FFN], min(DEPTH, layers)

    def time(num: int, num_heads: int, num_ffn: int) -> float:
        rest = (0,) * (layers - num)
        return measure(Shape(hidden, (num_heads,) * num + rest, (num_ffn,) * num + rest))

    whole, fewer, narrower = time(depth, heads, ffn), -(-heads // 2), -(-ffn // 2)
    head = _unit(whole - time(depth, fewer, ffn), depth * (heads - fewer))
    one = _unit(whole - time(depth, heads, narrower), depth * (ffn - narrower))
    without = max(0.0, whole - time(depth, heads, 0)) / depth  # an FFN sub-layer
    layer = (whole - time(1, heads, ffn)) / (depth - 1) if depth > 1 else without + heads * head
    bases = max(0.0, layer - without - heads * head), max(0.0, without - ffn * one)
    return Times(max(LEAST, whole - depth * layer), bases, (head, one))


def _unit(difference: float, num: int) -> float:
    """Of `num` units; of none where a layer has but one, whose time is the sub-layer's."""
    return max(LEAST, difference / max(1, num))


def table_sizes(size: int, round_to: int) -> list[int]:
    """Hidden sizes to measure at: shares of the dense one, rounded as pruned ones are."""
    sizes = {max(1, round(share * size / round_to)) * round_to for share in SHARES}
    return sorted({*(s for s in sizes if s < size), size})


def corrected(problem: Problem, shape: Shape, measure: Measure) -> Problem:
    """The problem with its table of times, if it has one, corrected by what a shape takes."""
    first, *also = [
        replace(limit, cost=limit.cost.corrected(shape, measure(shape)))
        if isinstance(limit.cost, LatencyCost)
        else limit
        for limit in problem.limits
    ]
    return replace(problem, cost=first.cost, budget=first.budget, also=tuple(also))


def choose_in_time(
    problem: Problem,
    guess: Callable[[Problem], PrunePlan],
    choose: Callable[[Problem], PrunePlan],
    refit: Callable[[PrunePlan, Problem, float], PrunePlan],
    measure: Measure,
    say: Callable[[str], None],
) -> tuple[PrunePlan, Problem]:
    """A plan whose network, timed, keeps the budget; and the problem with the table that says so.

    A corrected table may lead to another shape, for which it is wrong again. So after a few rounds
    a plan only follows the table, and its hidden size the times that were found.

    Args:
        problem: with a limit of time among its limits.
        guess: a good plan of a problem, at little cost: the table is corrected by it first.
        choose: the best plan of a problem.
        refit: a plan for another table and of about another hidden size, as like it as may be.
        measure: times a network of a shape.
        say: tells the user what was found.

    Raises:
        UserError: even the smallest allowed model exceeds a budget.
    """
    problem = corrected(problem, guess(problem).shape, measure)
    plan = choose(problem)
    timed: list[tuple[float, PrunePlan, Problem]] = []
    while True:
        problem = corrected(problem, plan.shape, measure)
        used = problem.used(plan.shape)
        say(f"timed: {plan.shape}  {used:.3f} of the budget")
        timed.append((used, plan, problem))
        if abs(used - 1) < NEAR or len(timed) == CHOICES + FITS:
            break
        try:
            if len(timed) < CHOICES:
                plan = choose(problem)
            else:
                plan = refit(plan, problem, _wanted([(u, p.shape) for u, p, _ in timed]))
        except UserError:  # the corrected table may leave too little
            break
    _, plan, problem = min(timed, key=lambda entry: abs(entry[0] - 1))
    return plan, problem


def _wanted(timed: list[tuple[float, Shape]]) -> float:
    """The hidden size at which the budget will be used up, as far as can be told.

    Args:
        timed: shares of the budget that were used, and the shapes that used them; the last one is
            to be improved.
    """
    used, last = timed[-1]
    sizes = [
        (share, shape.hidden)
        for share, shape in timed
        if shape.kept_layers == last.kept_layers and max(shape.heads) == max(last.heads)
    ]
    below = max((entry for entry in sizes if entry[0] <= 1), default=None)
    above = min((entry for entry in sizes if entry[0] > 1), default=None)
    if below is not None and above is not None:
        way = (1 - below[0]) / (above[0] - below[0])
        return below[1] + way * (above[1] - below[1])
    is_stuck = [size for _, size in sizes[-2:]] == [last.hidden] * 2  # FFN units did not help
    return last.hidden / used if is_stuck else last.hidden
