"""What allocation must meet: a model, its budgets, rounding and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.budget.cost import Budget, Cost, Limit
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Architecture, Axis, Shape

TOLERANCE = 1e-3  # of the budget may stay unused when dimensions are free


@dataclass(frozen=True)
class Problem:
    """What allocation knows of the model and the target.

    Attributes:
        architecture: the model's table.
        cost: what the budget counts.
        budget: the target.
        round_to: multiple that pruned dimensions are rounded to.
        is_uniform: stock layout, else per-layer.
        also: further limits, each of which must hold.
        head_retention: `(head_dim,)`, what a head is still worth with its first i + 1
            dimensions, for layouts that prune inside heads; None counts them alike.
        fixed: the only number of units allowed, of the axes that it names.
    """

    architecture: Architecture
    cost: Cost
    budget: Budget
    round_to: int
    is_uniform: bool
    also: tuple[Limit, ...] = ()
    head_retention: Tensor | None = None
    fixed: Mapping[Axis, int] = field(default_factory=dict)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """All that must hold."""
        return (Limit(self.cost, self.budget), *self.also)

    def sparsity(self, shape: Shape) -> float:
        """Share that a model of this shape saves of what the budget counts."""
        return 1 - self.cost.of(shape) / self.budget.dense

    def used(self, shape: Shape) -> float:
        """Share of the tightest budget that a model of this shape uses; above 1 it breaks it."""
        return max(limit.cost.of(shape) / limit.budget.target for limit in self.limits)

    @property
    def is_coupled(self) -> bool:
        """Whether heads times their width must be the hidden size."""
        return self.is_uniform and self.architecture.couples_heads

    def head_widths(self, hidden: Tensor, heads: int) -> tuple[Tensor | None, Tensor]:
        """Width of a head for each hidden size, and which sizes are possible.

        Args:
            hidden: hidden sizes, `(n,)`.
            heads: heads in each layer.

        Returns:
            `(n,)` dimensions of a head, or None where all stay, and `(n,)` bool.
        """
        whole, per_unit = self.architecture.head_dim, self.architecture.divides_hidden
        if not self.is_coupled or whole is None:
            divisor = heads * per_unit if self.is_uniform and per_unit else 1
            return None, hidden % divisor == 0
        possible = (hidden % heads == 0) & (hidden <= heads * whole)
        return (hidden // heads).clamp(1, whole), possible

    def retention(self, head_dim: Tensor | None) -> Any:
        """What a head is worth with these widths, 1 with all."""
        if head_dim is None:
            return 1.0
        if self.head_retention is None:
            return head_dim / float(self.architecture.head_dim or 1)
        return self.head_retention[head_dim - 1]

    def counts(self, axis: Axis, is_pruned: bool) -> list[int]:
        """Allowed numbers of units: multiples that make the dimension divisible, or all."""
        units = self.architecture.num_units[axis]
        if not is_pruned:
            return [units]
        if axis in self.fixed:
            return [self.fixed[axis]]
        step = self.multiple(axis)
        return sorted({*range(step, units, step), units})

    def multiple(self, axis: Axis) -> int:
        """Units per rounding step: `round_to` divided among the entries a unit covers."""
        if axis is not Axis.HEADS:
            return self.round_to
        if self.is_coupled:  # heads and their width make up the hidden size, which is rounded
            return 1
        width = next(
            self.architecture.units_per(dim)
            for spec in self.architecture.tensors
            for dim in spec.dims
            if dim.axis is Axis.HEADS and spec.is_write
        )
        return self.round_to // gcd(self.round_to, width)


def check_reachable(problem: Problem, pruned: frozenset[str]) -> None:
    """Raises UserError if no allowed shape meets the budget."""
    kept = torch.ones(problem.architecture.num_layers, dtype=torch.bool)
    kept[1:] = "layers" not in pruned
    hidden = torch.tensor(problem.counts(Axis.HIDDEN, Axis.HIDDEN in pruned))
    ffn = problem.counts(Axis.FFN, Axis.FFN in pruned)[0]
    shapes = []
    for heads in problem.counts(Axis.HEADS, Axis.HEADS in pruned):
        head_dim, possible = problem.head_widths(hidden, heads)
        for i in torch.nonzero(possible).flatten()[:1].tolist():
            width = None if head_dim is None else int(head_dim[i])
            shapes.append(uniform_shape(int(hidden[i]), heads, ffn, kept, width))
    if not shapes:
        raise UserError(
            f"no number of heads divides {hidden.tolist()[:9]}, as this family's stock config "
            "demands: use --layout per-layer"
        )
    for limit in problem.limits:
        budget, least = limit.budget, min(limit.cost.of(shape) for shape in shapes)
        if least > budget.target:
            share = least / budget.dense
            if share >= 1:
                raise UserError(
                    f"nothing can go with --prune {','.join(sorted(pruned))} in this layout: prune "
                    "more structures, or use --layout per-layer"
                )
            remedy = {
                "params": f"lower --sparsity below {1 - share:.3f}",
                "MACs": f"raise --macs above {share:.3f}",
                "ns": f"raise --latency-ms above {least / 1e6:.3f}",
            }[budget.kind]
            raise UserError(
                f"budget of {budget.text(budget.target)} is unreachable: with "
                f"--prune {','.join(sorted(pruned))} and --round-to {problem.round_to} the "
                f"smallest model has {budget.text(least)}; {remedy} or prune more structures"
            )


def uniform_shape(
    hidden: int, heads: int, ffn: int, kept: Tensor, head_dim: int | None = None
) -> Shape:
    """The same counts in every layer that is kept, `(L,)` bool, and none in the others."""
    return Shape(
        hidden,
        tuple(heads if k else 0 for k in kept.tolist()),
        tuple(ffn if k else 0 for k in kept.tolist()),
        head_dim,
    )
