"""ALLOCATE: trained masks and a budget -> exactly which units stay.

Training leaves, at the border of every structure, units with the same `log_alpha`:
there the loss per unit of cost is the Lagrangian's multiplier for all of them. So a
unit's benefit is its cost times its keep probability, and the best plan is the
feasible one with the largest summed benefit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_vtrans.allocation.shape_choice import Ranking, choose_free, choose_uniform
from llm_vtrans.basis.head_basis import HeadBasis
from llm_vtrans.budget.cost import complete
from llm_vtrans.budget.problem import TOLERANCE, Problem, check_reachable
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import UNIT_AXIS, Architecture, Axis, Place, Shape, Sublayer
from llm_vtrans.masking.by_layer import KEPT_HIDDEN, PROJECTORS, presence
from llm_vtrans.masking.masks import VIBMasks, keep_probability

REDUNDANT = 0.5  # a sub-layer with at most this keep probability goes


@dataclass(frozen=True)
class PrunePlan:
    """Kept units and the gate values that export folds into the weights.

    Attributes:
        keep: booleans, `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`; a sub-layer without
            kept units is removed.
        gate: float32, of the same structures and `layers (L, 2)`.
        head_dim: kept dimensions of every head; None keeps all.
        basis: of the heads, where not all of their dimensions are kept.
        maps: of the residual stream, `write` and `read` `(d, d)`, that tuning starts from; None
            for the identity.
        strength: how far the gate values have gone from 1 (at zero) to the masks' `mu` (at one).
    """

    keep: Mapping[str, Tensor]
    gate: Mapping[str, Tensor]
    head_dim: int | None = None
    basis: HeadBasis | None = None
    maps: Mapping[Place, Tensor] | None = None
    strength: float = 1.0

    @property
    def shape(self) -> Shape:
        """Counts of kept units."""
        return Shape(
            int(self.keep[Axis.HIDDEN].sum()),
            tuple(self.keep[Axis.HEADS].sum(1).tolist()),
            tuple(self.keep[Axis.FFN].sum(1).tolist()),
            self.head_dim,
        )

    @property
    def present(self) -> Tensor:
        """Which sub-layers stay, `(L, 2)` bool."""
        return torch.stack([self.keep[UNIT_AXIS[part]].any(1) for part in Sublayer], dim=1)

    def hard(self) -> dict[str, Tensor]:
        """Gate values with pruned units at zero: what the masked model multiplies by."""
        hard = {name: self.gate[name] * self.keep[name] for name in self.keep}
        # A removed sub-layer may have a bias, which no unit gate reaches.
        present = self.present
        if self.head_dim is not None and self.basis is not None:
            projectors = self.basis.projectors(self.head_dim)
            hard |= {PROJECTORS[role]: maps for role, maps in projectors.items()}
        if not self.keep[Axis.HIDDEN].all():
            hard[KEPT_HIDDEN] = torch.nonzero(self.keep[Axis.HIDDEN]).flatten()
        kept = {"hidden": self.keep[Axis.HIDDEN], "layers": present}
        return {
            **hard,
            "layers": self.gate["layers"] * present,
            **presence(kept, len(present)),
        }


def allocate(masks: VIBMasks, problem: Problem) -> PrunePlan:
    """The plan of largest benefit that the budget admits.

    Args:
        masks: trained masks; structures without a mask stay whole.
        problem: model, budget, rounding and layout.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    return Allocator(*scores_and_gates(masks), problem).plan()


@torch.no_grad()
def scores_and_gates(masks: VIBMasks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keep probability, float64, and `mu`, float32, of every unit, on the CPU."""
    scores = {
        name: keep_probability(alpha.double().cpu(), 1.0)
        for name, alpha in masks.log_alpha().items()
    }
    return scores, {name: masks.mu[name].detach().float().cpu() for name in masks.names()}


class Allocator:
    """Makes plans from scores, which are sorted once for all of them.

    Args:
        scores: in [0, 1], of the units of each pruned structure, float64; a sub-layer goes when
            its score in `layers` is at most one half.
        gate: factors that stay on the kept units; structures without one have ones.
        problem: model, budget, rounding and layout.
    """

    def __init__(self, scores: Mapping[str, Tensor], gate: Mapping[str, Tensor], problem: Problem):
        self._scores, self._problem = scores, problem
        full = complete(scores, problem.architecture)
        multiples = {axis.value: problem.multiple(axis) for axis in UNIT_AXIS.values()}
        pruned = frozenset(scores)
        self._ranking = Ranking(full, _benefits(full, problem), pruned, multiples)
        gates = complete(gate or {"layers": torch.ones(1, 1)}, problem.architecture)
        self._gate = {name: gate.contiguous() for name, gate in gates.items()}
        self._chosen: dict[tuple[object, ...], Shape | None] = {}

    def plan(
        self, kept: Tensor | None = None, fixed: Mapping[Axis, int] | None = None
    ) -> PrunePlan:
        """The plan of largest benefit.

        Args:
            kept: the sub-layers that stay, `(L, 2)` bool; None for as many of those that the
                scores keep as use the budget best.
            fixed: numbers of units, where they are not free; by default the problem's.

        Raises:
            UserError: no allowed model meets the budget.
        """
        problem = self._problem if fixed is None else replace(self._problem, fixed=fixed)
        shape = self._of_scores(problem) if kept is None else self._choose(kept, problem)
        if shape is None:
            raise _unreachable(problem)
        return PrunePlan(self._keep_best(shape), self._gate, shape.head_dim)

    def _choose(self, present: Tensor, problem: Problem) -> Shape | None:
        """Looked for once: a search comes to the same place from several sides."""
        key = (*present.flatten().tolist(), *sorted(problem.fixed.items()))
        if key not in self._chosen:
            choose = choose_uniform if problem.is_uniform else choose_free
            self._chosen[key] = choose(self._ranking, present, problem)
        return self._chosen[key]

    def _of_scores(self, problem: Problem) -> Shape:
        """With the sub-layers that the scores keep, and those that it takes to use the budget."""
        scores = self._scores
        present = _present(scores, problem.architecture)
        while _are_gone(present, scores) and _fits_whole(present, problem):
            present = _restore_one(present, scores)
        while (shape := self._choose(present, problem)) is None:
            present = _drop_one(present, scores, problem)
        if problem.round_to == 1:  # else rounding says what is left
            fuller = present  # fewer layers, each nearly whole, may leave more than is promised
            while problem.used(shape) < 1 - TOLERANCE and _are_gone(fuller, scores):
                fuller = _restore_one(fuller, scores)
                other = self._choose(fuller, problem)
                if other is not None and problem.used(other) >= 1 - TOLERANCE:
                    shape = other
        return shape

    def _keep_best(self, shape: Shape) -> dict[str, Tensor]:
        """The highest-scored units of each structure, as many as the shape says."""
        counts = {Axis.HIDDEN: [shape.hidden], Axis.HEADS: shape.heads, Axis.FFN: shape.ffn}
        keep = {}
        for axis, numbers in counts.items():
            order = self._ranking.order[axis]
            is_best = torch.arange(order.shape[-1]) < torch.tensor(numbers)[:, None]
            keep[axis.value] = torch.zeros_like(order, dtype=torch.bool).scatter_(
                -1, order, is_best.view_as(order)
            )
        return keep


def _unreachable(problem: Problem) -> UserError:
    return UserError(
        f"budget of {problem.budget.text(problem.budget.target)} is unreachable for these "
        "masks: lower --sparsity or train with more structures in --prune"
    )


def _are_gone(present: Tensor, scores: Mapping[str, Tensor]) -> bool:
    """Whether masks of layers removed some."""
    return "layers" in scores and not bool(present.all())


def _present(scores: Mapping[str, Tensor], architecture: Architecture) -> Tensor:
    """Which sub-layers stay, `(L, 2)` bool; the first attention stays (caches read its length)."""
    shape = (architecture.num_layers, 2)
    if "layers" not in scores:
        return torch.ones(shape, dtype=torch.bool)
    present = (scores["layers"] > REDUNDANT).expand(shape).clone()
    present[0, : 2 if goes_whole(scores) else 1] = True
    return present


def goes_whole(scores: Mapping[str, Tensor]) -> bool:
    """Whether one mask serves both sub-layers of a layer."""
    return scores["layers"].shape[1] == 1


def _fits_whole(present: Tensor, problem: Problem) -> bool:
    """Whether the largest model with these sub-layers leaves room in every budget."""
    units = problem.architecture.num_units
    rows = present.long() * torch.tensor([units[Axis.HEADS], units[Axis.FFN]])
    heads, ffn = rows.T.tolist()
    shape = Shape(units[Axis.HIDDEN], tuple(heads), tuple(ffn))
    return all(limit.cost.of(shape) < limit.budget.target for limit in problem.limits)


def _restore_one(present: Tensor, scores: Mapping[str, Tensor]) -> Tensor:
    """Brings back the removed sub-layer of highest score: the rest cannot fill the budget."""
    gone = scores["layers"].expand(present.shape).masked_fill(present, -torch.inf)
    layer, part = divmod(int(gone.argmax()), 2)
    present = present.clone()
    present[layer, slice(None) if goes_whole(scores) else part] = True
    return present


def _drop_one(present: Tensor, scores: Mapping[str, Tensor], problem: Problem) -> Tensor:
    """Removes the sub-layer of lowest score: the budget cannot hold one unit of each."""
    if "layers" not in scores or int(present[1:].sum()) == 0:
        check_reachable(problem, frozenset(scores))
        raise _unreachable(problem)
    left = scores["layers"].expand(present.shape).masked_fill(~present, torch.inf).clone()
    left[0] = torch.inf
    layer, part = divmod(int(left.argmin()), 2)
    present = present.clone()
    present[layer, slice(None) if goes_whole(scores) else part] = False
    return present


def _benefits(scores: Mapping[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """Keep probability times marginal cost at the expected model, per unit.

    With several budgets, the sum of the shares of each.
    """
    variables = {n: s.clone().requires_grad_() for n, s in scores.items()}
    shares = [limit.cost.expected(variables) / limit.budget.dense for limit in problem.limits]
    gradients = torch.autograd.grad(
        torch.stack(shares).sum(), list(variables.values()),
        allow_unused=True, materialize_grads=True,  # a time may not depend on all structures
    )  # fmt: skip
    return {n: g * scores[n] for n, g in zip(variables, gradients, strict=True)}
