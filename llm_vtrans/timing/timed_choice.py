"""ALLOCATE under a latency budget: the chosen network itself is timed.

Hardware does not keep to any table, so the table of times is corrected by what the chosen shape
takes, and another one is chosen, until one keeps the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.candidates import Fit
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Shape
from llm_vtrans.timing.latency_cost import LatencyCost, Measure

AIM = 0.985  # of the time allowed: what is timed again comes out longer or shorter
UNDER, OVER = 0.975, 1.015  # times as much as was aimed at is near enough
CHOICES, FITS = 2, 6  # rounds of timing and correcting, where all is chosen and where little is

Refit = Callable[[Sequence[Fit], Sequence[Shape]], PrunePlan | None]


def corrected(problem: Problem, shape: Shape, measure: Measure) -> Problem:
    """The problem with its table of times, if it has one, corrected by what a shape takes."""
    return _with_tables(problem, lambda _, cost: cost.corrected(shape, measure(shape)))


def _with_tables(problem: Problem, change: Callable[[int, LatencyCost], LatencyCost]) -> Problem:
    """The problem with its tables of times changed, each known by its limit's place."""
    first, *also = [
        replace(limit, cost=change(place, limit.cost))
        if isinstance(limit.cost, LatencyCost)
        else limit
        for place, limit in enumerate(problem.limits)
    ]
    return replace(problem, cost=first.cost, budget=first.budget, also=tuple(also))


@dataclass(frozen=True)
class Timed:
    """What a plan's network took.

    Attributes:
        plan: its plan.
        problem: with the table corrected by it.
    """

    plan: PrunePlan
    problem: Problem

    @property
    def shape(self) -> Shape:
        """Of the network."""
        return self.plan.shape

    @cached_property
    def used(self) -> float:
        """Share of the budget."""
        return self.problem.used(self.plan.shape)

    @property
    def miss(self) -> float:
        """How far that is from all of it."""
        return abs(self.used - 1)


def choose_in_time(
    problem: Problem,
    guess: Callable[[Problem], PrunePlan],
    choose: Callable[[Problem], PrunePlan],
    refit: Refit,
    measure: Measure,
    say: Callable[[str], None],
) -> tuple[PrunePlan, Problem]:
    """A plan whose network, timed, keeps the budget; and the problem with the table that says so.

    A corrected table may lead to another shape, for which it is wrong again. So after a few rounds
    the layers are no longer chosen, and the sizes follow the times that were found.

    Args:
        problem: with a limit of time among its limits.
        guess: a good plan of a problem, at little cost: the table is corrected by it first.
        choose: the best plan of a problem.
        refit: the best plan that fits something and is none of some shapes, if there is one.
        measure: times a network of a shape.
        say: tells the user what was found.

    Raises:
        UserError: even the smallest allowed model exceeds a budget.
    """
    problem = corrected(problem, guess(problem).shape, measure)
    plan: PrunePlan | None = choose(problem)
    timed: list[Timed] = []
    while plan is not None:
        timed.append(Timed(plan, corrected(problem, plan.shape, measure)))
        say(f"timed: {plan.shape}  {timed[-1].used:.3f} of the budget")
        if UNDER < timed[-1].used < OVER or len(timed) == CHOICES + FITS:
            break
        problem = timed[-1].problem
        try:
            plan = choose(problem) if len(timed) < CHOICES else _fitted(timed, refit)
        except UserError:  # the corrected table may leave too little
            break
    best = min(timed, key=lambda entry: (entry.used >= OVER, entry.miss))  # it is a limit
    return best.plan, best.problem


def _fitted(timed: list[Timed], refit: Refit) -> PrunePlan | None:
    """A plan that was not timed yet, like the best of those of some layers that were."""
    known = [entry.shape for entry in timed]
    best: list[Timed] = []
    for entry in sorted(timed, key=lambda entry: entry.miss):
        if not any(_are_alike(entry, other) for other in best):
            best.append(entry)
    for fits in ([_between(entry, timed) for entry in best], [_alone(entry) for entry in best]):
        plan = refit(fits, known)
        if plan is not None:
            return plan
    return None


def _between(entry: Timed, timed: list[Timed]) -> Fit:
    """By another one of the same layers, too: the table is then right for both.

    And where one takes too long and one does not, the sizes are between theirs.
    """
    others = [other for other in timed if other is not entry and _are_alike(entry, other)]
    beyond = [other for other in others if (other.used > 1) != (entry.used > 1)]
    fit = _alone(entry)
    if not others:
        return fit
    other = min(beyond or others, key=lambda entry: entry.miss)
    way = (1 - entry.used) / (other.used - entry.used) if beyond else 0.0
    hidden = fit.hidden + way * (other.shape.hidden - fit.hidden)
    heads = fit.heads + way * (max(other.shape.heads) - fit.heads)
    return Fit(entry.plan, _through(other, entry), hidden, heads)


def _alone(entry: Timed) -> Fit:
    return Fit(entry.plan, entry.problem, entry.shape.hidden, max(entry.shape.heads))


def _are_alike(one: Timed, other: Timed) -> bool:
    """Of the same layers."""
    return one.plan.present.equal(other.plan.present)


def _through(one: Timed, other: Timed) -> Problem:
    """The problem with a table that is right for two networks of the same layers."""

    def change(place: int, cost: LatencyCost) -> LatencyCost:
        found = [(t.shape, t.problem.limits[place].cost.of(t.shape)) for t in (one, other)]
        return cost.through(*found)

    return _with_tables(other.problem, change)
