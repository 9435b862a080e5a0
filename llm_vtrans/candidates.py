"""ALLOCATE, refined: plans that benefit ranks close to the best, compared by what they lose.

The benefit of a plan is a first-order estimate around the expected model; the loss of the
hard-masked network is the truth, and a forward pass of a few batches tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from llm_vtrans.allocation import Problem, PrunePlan, allocate_scores, scores_and_gates
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Axis
from llm_vtrans.masks import VIBMasks

HIDDEN_RATIOS = (0.85, 0.9, 0.95, 1.05, 1.1, 1.15)  # of the hidden size of largest benefit


def candidates(masks: VIBMasks, problem: Problem) -> Iterator[PrunePlan]:
    """The plan of largest benefit first, then its neighbours within the same budget.

    Neighbours have another hidden size, so more or fewer heads and FFN units, or keep the
    layers that the masks would remove.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    scores, gate = scores_and_gates(masks)
    best = allocate_scores(scores, gate, problem)
    yield best
    shallow = bool((~best.present).any())
    whole = {name: score for name, score in scores.items() if name != "layers"}
    allowed = problem.counts(Axis.HIDDEN, Axis.HIDDEN in scores)
    for chosen in (scores, whole) if shallow and whole else (scores,):
        sizes = {min(allowed, key=lambda n: abs(n - r * best.shape.hidden)) for r in HIDDEN_RATIOS}
        if chosen is whole:
            sizes.add(best.shape.hidden)
        for size in sorted(sizes - ({best.shape.hidden} if chosen is scores else set())):
            with suppress(UserError):  # this size may not fit the budget
                yield allocate_scores(chosen, gate, replace(problem, hidden_size=size))


def choose(
    masks: VIBMasks, problem: Problem, loss: Callable[[PrunePlan], float]
) -> tuple[PrunePlan, float]:
    """The candidate of lowest loss, and that loss.

    Args:
        masks: trained masks.
        problem: model, budget, rounding and layout.
        loss: of the hard-masked network, lower is better.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    losses = ((loss(plan), number, plan) for number, plan in enumerate(candidates(masks, problem)))
    least, _, plan = min(losses, key=lambda entry: entry[:2])
    return plan, least
