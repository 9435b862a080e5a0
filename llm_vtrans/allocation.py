"""ALLOCATE: trained masks and a budget -> exactly which units stay.

Training leaves, at the border of every structure, units with the same `log_alpha`:
there the loss per unit of cost is the Lagrangian's multiplier for all of them. So a
unit's benefit is its cost times its keep probability, and the best plan is the
feasible one with the largest summed benefit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.attachment import PROJECTORS, presence
from llm_vtrans.budget import Budget, Cost, Limit, complete
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import UNIT_AXIS, Architecture, Axis, Shape, Sublayer
from llm_vtrans.head_basis import HeadBasis
from llm_vtrans.masks import VIBMasks, keep_probability

REDUNDANT = 0.5  # a sub-layer with at most this keep probability goes
TOLERANCE = 1e-3  # of the budget may stay unused when dimensions are free


@dataclass(frozen=True)
class PrunePlan:
    """Kept units and the gate values that export folds into the weights.

    Attributes:
        keep: booleans, `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`; a sub-layer without
            kept units is removed.
        gate: the masks' `mu`, float32, of the same structures and `layers (L, 2)`.
        head_dim: kept dimensions of every head; None keeps all.
        basis: of the heads, where not all of their dimensions are kept.
        maps: of the residual stream, `write` and `read` `(d, d)`, that tuning starts from; None
            for the identity.
    """

    keep: Mapping[str, Tensor]
    gate: Mapping[str, Tensor]
    head_dim: int | None = None
    basis: HeadBasis | None = None
    maps: Mapping[str, Tensor] | None = None

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
        kept = {"hidden": self.keep[Axis.HIDDEN], "layers": present}
        return {
            **hard,
            "layers": self.gate["layers"] * present,
            **presence(kept, len(present)),
        }


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
        whole = self.architecture.head_dim
        if not self.is_coupled or whole is None:
            return None, torch.ones_like(hidden, dtype=torch.bool)
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


def allocate(masks: VIBMasks, problem: Problem) -> PrunePlan:
    """The plan of largest benefit that the budget admits.

    Args:
        masks: trained masks; structures without a mask stay whole.
        problem: model, budget, rounding and layout.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    return allocate_scores(*scores_and_gates(masks), problem)


@torch.no_grad()
def scores_and_gates(masks: VIBMasks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keep probability, float64, and `mu`, float32, of every unit, on the CPU."""
    scores = {
        name: keep_probability(alpha.double().cpu(), 1.0)
        for name, alpha in masks.log_alpha().items()
    }
    return scores, {name: masks.mu[name].detach().float().cpu() for name in masks.names()}


def allocate_scores(
    scores: Mapping[str, Tensor], gate: Mapping[str, Tensor], problem: Problem
) -> PrunePlan:
    """The same for any scores in [0, 1], such as those of one-shot baselines.

    Args:
        scores: of the units of each pruned structure, float64; a sub-layer goes when its score
            in `layers` is at most one half.
        gate: factors that stay on the kept units; structures without one have ones.
        problem: model, budget, rounding and layout.

    Raises:
        UserError: even the smallest allowed model exceeds the budget.
    """
    architecture = problem.architecture
    pruned = frozenset(scores)
    full = complete(scores, architecture)
    present = _present(scores, architecture)
    while "layers" in scores and not bool(present.all()) and _fits_whole(present, problem):
        present = _restore_one(present, scores)
    benefits = _benefits(full, problem)
    choose = _choose_uniform if problem.is_uniform else _choose_free
    while (shape := choose(full, benefits, present, pruned, problem)) is None:
        present = _drop_one(present, scores, problem)
    gates = complete(gate or {"layers": torch.ones(1, 1)}, architecture)
    gates = {name: gate.contiguous() for name, gate in gates.items()}
    return PrunePlan(_keep_best(full, shape), gates, shape.head_dim)


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
            shapes.append(_uniform_shape(int(hidden[i]), heads, ffn, kept, width))
    if not shapes:
        raise UserError(
            f"no number of heads divides {hidden.tolist()[:9]}, as this family's stock config "
            "demands: use --layout per-layer"
        )
    for limit in problem.limits:
        budget, least = limit.budget, min(limit.cost.of(shape) for shape in shapes)
        if least > budget.target:
            remedy = f"lower --sparsity below {1 - least / budget.dense:.3f}"
            if budget.kind != "params":
                remedy = f"raise --macs above {least / budget.dense:.3f}"
            raise UserError(
                f"budget of {budget.target:,} {budget.kind} is unreachable: with "
                f"--prune {','.join(sorted(pruned))} and --round-to {problem.round_to} the "
                f"smallest model has {least:,}; {remedy} or prune more structures"
            )


def _present(scores: Mapping[str, Tensor], architecture: Architecture) -> Tensor:
    """Which sub-layers stay, `(L, 2)` bool; the first attention stays (caches read its length)."""
    shape = (architecture.num_layers, 2)
    if "layers" not in scores:
        return torch.ones(shape, dtype=torch.bool)
    present = (scores["layers"] > REDUNDANT).expand(shape).clone()
    present[0, : 2 if _goes_whole(scores) else 1] = True
    return present


def _goes_whole(scores: Mapping[str, Tensor]) -> bool:
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
    present[layer, slice(None) if _goes_whole(scores) else part] = True
    return present


def _drop_one(present: Tensor, scores: Mapping[str, Tensor], problem: Problem) -> Tensor:
    """Removes the sub-layer of lowest score: the budget cannot hold one unit of each."""
    if "layers" not in scores or int(present[1:].sum()) == 0:
        check_reachable(problem, frozenset(scores))
        raise UserError(
            f"budget of {problem.budget.target:,} {problem.budget.kind} is unreachable for these "
            "masks: lower --sparsity or train with more structures in --prune"
        )
    left = scores["layers"].expand(present.shape).masked_fill(~present, torch.inf).clone()
    left[0] = torch.inf
    layer, part = divmod(int(left.argmin()), 2)
    present = present.clone()
    present[layer, slice(None) if _goes_whole(scores) else part] = False
    return present


def _benefits(scores: Mapping[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """Keep probability times marginal cost at the expected model, per unit.

    With several budgets, the sum of the shares of each.
    """
    variables = {n: s.clone().requires_grad_() for n, s in scores.items()}
    shares = [limit.cost.expected(variables) / limit.budget.dense for limit in problem.limits]
    gradients = torch.autograd.grad(torch.stack(shares).sum(), list(variables.values()))
    return {n: g * scores[n] for n, g in zip(variables, gradients, strict=True)}


def _hidden_gain(benefits: Mapping[str, Tensor], counts: list[int]) -> Tensor:
    """Summed benefit of the best `n` hidden dimensions for each `n` in `counts`."""
    ranked = benefits[Axis.HIDDEN].sort(descending=True).values.cumsum(0)
    return ranked[torch.tensor(counts) - 1]


def _choose_uniform(
    scores: Mapping[str, Tensor],
    benefits: Mapping[str, Tensor],
    present: Tensor,
    pruned: frozenset[str],
    problem: Problem,
) -> Shape | None:
    """One head count and one FFN count for every kept layer, by enumeration."""
    kept = present.any(dim=1)
    num_kept = int(kept.sum())
    options = {
        axis: problem.counts(axis, axis in pruned) for axis in (Axis.HIDDEN, *UNIT_AXIS.values())
    }

    def gain(axis: Axis) -> Tensor:  # best n units of every kept layer, for each allowed n
        ranked = benefits[axis][kept].sort(dim=1, descending=True).values.cumsum(1).sum(0)
        return ranked[torch.tensor(options[axis]) - 1]

    hidden = torch.tensor(options[Axis.HIDDEN])
    ffn_options = torch.tensor(options[Axis.FFN])
    hidden_gain, ffn_gain = _hidden_gain(benefits, options[Axis.HIDDEN]), gain(Axis.FFN)
    found: list[tuple[float, float, Shape]] = []
    for heads, heads_gain in zip(options[Axis.HEADS], gain(Axis.HEADS).tolist(), strict=True):
        head_dim, possible = problem.head_widths(hidden, heads)
        room, slope = _ffn_room(problem, hidden, heads, head_dim, num_kept)
        most = torch.div(room, slope, rounding_mode="floor").amin(0)
        index = torch.searchsorted(ffn_options, most, right=True) - 1
        total = hidden_gain + heads_gain * problem.retention(head_dim)
        total = total + ffn_gain[index.clamp(min=0)]
        targets = torch.tensor([[limit.budget.target] for limit in problem.limits])
        unused = ((room - slope * ffn_options[index.clamp(min=0)]) / targets).amin(0)
        for i in torch.nonzero(possible & (index >= 0)).flatten().tolist():
            width = None if head_dim is None else int(head_dim[i])
            ffn = int(ffn_options[index[i]])
            shape = _uniform_shape(int(hidden[i]), heads, ffn, kept, width)
            found.append((float(unused[i]), float(total[i]), shape))
    if not found:
        return None
    fitting = [entry for entry in found if entry[0] <= TOLERANCE]
    if not fitting:  # rounding leaves no shape this close: the fullest near the best gain
        best = max(entry[1] for entry in found)
        fitting = [e for e in found if e[1] >= 0.98 * best] if problem.round_to > 1 else found
        return min(fitting, key=lambda entry: entry[0])[2]
    return max(fitting, key=lambda entry: entry[1])[2]


def _ffn_room(
    problem: Problem, hidden: Tensor, heads: int, head_dim: Tensor | None, num_kept: int
) -> tuple[Tensor, Tensor]:
    """What every limit leaves for FFN units, and the price of one in each kept layer.

    Returns:
        Two tensors `(num_limits, num_hidden_sizes)`.
    """
    rooms, slopes = [], []
    for limit in problem.limits:
        cost = limit.cost
        base = cost.part(Sublayer.FFN, hidden, 0)
        attention = cost.part(Sublayer.ATTENTION, hidden, heads, head_dim)
        used = cost.outside(hidden) + num_kept * (attention + base)
        rooms.append(limit.budget.target - used)
        slopes.append(num_kept * (cost.part(Sublayer.FFN, hidden, 1) - base))
    return torch.stack(rooms), torch.stack(slopes)


def _uniform_shape(
    hidden: int, heads: int, ffn: int, kept: Tensor, head_dim: int | None = None
) -> Shape:
    return Shape(
        hidden,
        tuple(heads if k else 0 for k in kept.tolist()),
        tuple(ffn if k else 0 for k in kept.tolist()),
        head_dim,
    )


@dataclass(frozen=True)
class _Blocks:
    """Units gathered into rounding blocks, in the order in which they are taken."""

    benefit: Tensor  # (num_blocks,)
    is_ffn: Tensor  # (num_blocks,) bool
    layer: Tensor  # (num_blocks,)
    size: Tensor  # (num_blocks,) units in the block
    num_forced: int  # leading blocks that every plan contains


def _blocks(
    scores: Mapping[str, Tensor],
    benefits: Mapping[str, Tensor],
    present: Tensor,
    pruned: frozenset[str],
    problem: Problem,
) -> _Blocks:
    rows: list[tuple[float, float, int, int, int]] = []  # order, benefit, ffn?, layer, size
    for index, part in enumerate(Sublayer):
        axis = UNIT_AXIS[part]
        units = problem.architecture.num_units[axis]
        step = min(problem.multiple(axis), units) if axis.value in pruned else units
        for layer in torch.nonzero(present[:, index]).flatten().tolist():
            order = scores[axis][layer].argsort(descending=True)
            for rank, chunk in enumerate(order.split(step)):
                score = torch.inf if rank == 0 else float(scores[axis][layer][chunk].mean())
                benefit = float(benefits[axis][layer][chunk].sum())
                rows.append((score, benefit, index, layer, len(chunk)))
    rows.sort(key=lambda row: -row[0])
    columns = list(zip(*rows, strict=True))
    return _Blocks(
        benefit=torch.tensor(columns[1], dtype=torch.float64),
        is_ffn=torch.tensor(columns[2]).bool(),
        layer=torch.tensor(columns[3]),
        size=torch.tensor(columns[4]),
        num_forced=sum(row[0] == torch.inf for row in rows),
    )


def _choose_free(
    scores: Mapping[str, Tensor],
    benefits: Mapping[str, Tensor],
    present: Tensor,
    pruned: frozenset[str],
    problem: Problem,
) -> Shape | None:
    """Counts free in every layer: for each hidden size the best-scored units that fit."""
    blocks = _blocks(scores, benefits, present, pruned, problem)
    units = {
        Sublayer.ATTENTION: (blocks.size * ~blocks.is_ffn).cumsum(0),
        Sublayer.FFN: (blocks.size * blocks.is_ffn).cumsum(0),
    }
    gains = blocks.benefit.cumsum(0)
    hidden_options = problem.counts(Axis.HIDDEN, Axis.HIDDEN in pruned)
    best: tuple[float, int, Tensor] | None = None
    for hidden, hidden_gain in zip(
        hidden_options, _hidden_gain(benefits, hidden_options).tolist(), strict=True
    ):
        rows = []
        for limit in problem.limits:
            row = torch.full_like(gains, limit.cost.outside(hidden)).long()
            for index, part in enumerate(Sublayer):
                base = limit.cost.part(part, hidden, 0)
                slope = limit.cost.part(part, hidden, 1) - base
                row = row + int(present[:, index].sum()) * base + slope * units[part]
            rows.append(row)
        spent = torch.stack(rows)
        num = _num_within(spent, problem)
        if num < blocks.num_forced:
            continue
        gain = hidden_gain + float(gains[num - 1])
        if best is None or gain > best[0]:
            best = (gain, hidden, spent)
    if best is None:
        return None
    _, hidden, spent = best
    return _fill(blocks, hidden, spent, problem)


def _num_within(spent: Tensor, problem: Problem) -> int:
    """Leading blocks that every limit admits.

    Args:
        spent: cost of the first i + 1 blocks, `(num_limits, num_blocks)`.
        problem: gives the limits.
    """
    targets = torch.tensor([[limit.budget.target] for limit in problem.limits])
    return int(torch.searchsorted(spent, targets, right=True).min())


def _fill(blocks: _Blocks, hidden: int, spent: Tensor, problem: Problem) -> Shape:
    """Takes blocks in order while they fit, then any later one that still does."""
    limits = problem.limits
    num = _num_within(spent, problem)
    taken = list(range(num))
    rooms = [limit.budget.target - int(spent[i, num - 1]) for i, limit in enumerate(limits)]
    prices = {
        part: [
            int(limit.cost.part(part, hidden, 1) - limit.cost.part(part, hidden, 0))
            for limit in limits
        ]
        for part in Sublayer
    }
    closed: set[tuple[bool, int]] = set()  # after a block, only the next one of its row may follow
    for i in range(num, spent.shape[1]):
        row = bool(blocks.is_ffn[i]), int(blocks.layer[i])
        part = Sublayer.FFN if blocks.is_ffn[i] else Sublayer.ATTENTION
        left = [
            room - price * int(blocks.size[i])
            for room, price in zip(rooms, prices[part], strict=True)
        ]
        if min(left) >= 0 and row not in closed:
            taken.append(i)
            rooms = left
        else:
            closed.add(row)
    counts = torch.zeros(2, problem.architecture.num_layers, dtype=torch.long)
    index = torch.tensor(taken)
    counts.index_put_(
        (blocks.is_ffn[index].long(), blocks.layer[index]), blocks.size[index], accumulate=True
    )
    return Shape(hidden, tuple(counts[0].tolist()), tuple(counts[1].tolist()))


def _keep_best(scores: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The highest-scored units of each structure, as many as the shape says."""

    def top(values: Tensor, count: int) -> Tensor:
        keep = torch.zeros_like(values, dtype=torch.bool)
        keep[values.argsort(descending=True, stable=True)[:count]] = True
        return keep

    return {
        Axis.HIDDEN.value: top(scores[Axis.HIDDEN], shape.hidden),
        Axis.HEADS.value: torch.stack(
            [top(row, n) for row, n in zip(scores[Axis.HEADS], shape.heads, strict=True)]
        ),
        Axis.FFN.value: torch.stack(
            [top(row, n) for row, n in zip(scores[Axis.FFN], shape.ffn, strict=True)]
        ),
    }
