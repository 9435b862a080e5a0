"""ALLOCATE under a latency budget: the chosen network itself is timed.

Hardware does not keep to any table, so the table of times is corrected by what the chosen shape
takes, and another one is chosen, until one keeps the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Shape
from llm_vtrans.timing.latency_cost import LatencyCost, Measure

AIM, NEAR = 0.985, 0.015  # of the time allowed, and as much beside it is what was aimed at
CHOICES, FITS = 2, 6  # rounds of timing and correcting, where all is chosen and where little is

Refit = Callable[[PrunePlan, Problem, float, float], PrunePlan]


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
    the plan is no longer chosen, but its sizes follow the times that were found.

    Args:
        problem: with a limit of time among its limits.
        guess: a good plan of a problem, at little cost: the table is corrected by it first.
        choose: the best plan of a problem.
        refit: a plan for another table, of about another hidden size and another number of heads,
            as like it as may be.
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
        if timed[-1].miss < NEAR or len(timed) == CHOICES + FITS:
            break
        problem = timed[-1].problem
        try:
            plan = choose(problem) if len(timed) < CHOICES else _fitted(timed, refit)
        except UserError:  # the corrected table may leave too little
            break
    best = min(timed, key=lambda entry: entry.miss)
    return best.plan, best.problem


def _fitted(timed: list[Timed], refit: Refit) -> PrunePlan | None:
    """A plan that was not timed yet, like one of those that were, closest to the budget first.

    Two plans of the same layers tell more than one: the table is then right for both, and where
    one takes too long and one does not, the sizes are between theirs.
    """
    known = [entry.shape for entry in timed]
    for entry in sorted(timed, key=lambda entry: entry.miss):
        hidden, heads = float(entry.shape.hidden), float(max(entry.shape.heads))
        tried = [(entry.problem, hidden, heads)]
        others = [t for t in timed if t is not entry and t.plan.present.equal(entry.plan.present)]
        beyond = [t for t in others if (t.used > 1) != (entry.used > 1)]
        if others:
            other = min(beyond or others, key=lambda entry: entry.miss)
            way = (1 - entry.used) / (other.used - entry.used) if beyond else 0.0
            hidden += way * (other.shape.hidden - hidden)
            heads += way * (max(other.shape.heads) - heads)
            tried.insert(0, (_through(other, entry), hidden, heads))
        for found in tried:
            plan = refit(entry.plan, *found)
            if plan.shape not in known:
                return plan
    return None


def _through(one: Timed, other: Timed) -> Problem:
    """The problem with a table that is right for two networks of the same layers."""

    def change(place: int, cost: LatencyCost) -> LatencyCost:
        found = [(t.shape, t.problem.limits[place].cost.of(t.shape)) for t in (one, other)]
        return cost.through(*found)

    return _with_tables(other.problem, change)
