"""Which counts of units a budget admits, and which of these counts have the largest benefit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from llm_vtrans.budget.problem import TOLERANCE, Problem, uniform_shape
from llm_vtrans.families.base import UNIT_AXIS, Axis, Shape, Sublayer


@dataclass(frozen=True)
class Ranking:
    """What a choice goes by, sorted once for all choices.

    Attributes:
        scores: of the units of every structure, float64; within a layer the best ones stay.
        benefits: of the same units, in the same order; their sum is maximised.
        pruned: structures of which units may go.
        multiples: units in a rounding step of every structure.
    """

    scores: Mapping[str, Tensor]
    benefits: Mapping[str, Tensor]
    pruned: frozenset[str]
    multiples: Mapping[str, int]

    @cached_property
    def order(self) -> dict[str, Tensor]:
        """Positions of the units, the best first, of the same shapes as scores."""
        return {
            n: torch.argsort(s, dim=-1, descending=True, stable=True)
            for n, s in self.scores.items()
        }

    @cached_property
    def gains(self) -> dict[str, Tensor]:
        """Summed benefit of the best `n + 1` units at `n`, of the same shapes as scores."""
        return {n: self.benefits[n].gather(-1, o).cumsum(-1) for n, o in self.order.items()}

    @cached_property
    def blocks(self) -> _Blocks:
        """Of all sub-layers."""
        return _blocks(self)


def choose_uniform(ranking: Ranking, present: Tensor, problem: Problem) -> Shape | None:
    """One head count and one FFN count for every kept layer, by enumeration.

    Args:
        ranking: of all units.
        present: which sub-layers stay, `(L, 2)` bool.
        problem: model, budget, rounding and layout.
    """
    kept = present.any(dim=1)
    num_kept = int(kept.sum())
    options = {
        axis: problem.counts(axis, axis in ranking.pruned)
        for axis in (Axis.HIDDEN, *UNIT_AXIS.values())
    }

    def gain(axis: Axis) -> Tensor:  # best n units of every kept layer, for each allowed n
        return ranking.gains[axis][kept].sum(0)[torch.tensor(options[axis]) - 1]

    hidden = torch.tensor(options[Axis.HIDDEN])
    ffn_options = torch.tensor(options[Axis.FFN])
    hidden_gain, ffn_gain = ranking.gains[Axis.HIDDEN][hidden - 1], gain(Axis.FFN)
    targets = torch.tensor([[limit.budget.target] for limit in problem.limits])
    columns: list[tuple[Tensor, ...]] = []  # unused, step, gain, hidden, heads, FFN units, width
    for heads, heads_gain in zip(options[Axis.HEADS], gain(Axis.HEADS).tolist(), strict=True):
        head_dim, possible = problem.head_widths(hidden, heads)
        room, slope = ffn_room(problem, hidden, heads, head_dim, num_kept)
        most = torch.div(room, slope, rounding_mode="floor").amin(0)
        index = torch.searchsorted(ffn_options, most, right=True) - 1
        ffn = ffn_options[index.clamp(min=0)]
        total = hidden_gain + heads_gain * problem.retention(head_dim)
        total = total + ffn_gain[index.clamp(min=0)]
        unused, step = ((room - slope * ffn) / targets).amin(0), (slope / targets).amax(0)
        width = torch.full_like(hidden, 0) if head_dim is None else head_dim
        rows = (unused, step, total, hidden, torch.full_like(hidden, heads), ffn, width)
        columns.append(tuple(column[possible & (index >= 0)] for column in rows))
    unused, step, total, *sizes = map(torch.cat, zip(*columns, strict=True))
    if not len(total):
        return None
    if bool((unused <= TOLERANCE).any()):
        best = total.masked_fill(unused > TOLERANCE, -torch.inf)
    elif problem.round_to > 1:
        # Rounding leaves no shape this close: the fullest near the best gain.
        best = (-unused).masked_fill(total < 0.98 * total.max(), -torch.inf)
    else:
        # Nor does one FFN unit in every layer: all as full, to such a unit, are alike.
        best = total.masked_fill(unused - unused.min() >= step, -torch.inf)
    first = int(torch.nonzero(best == best.max())[0])
    size, num_heads, num_ffn, head_width = (int(column[first]) for column in sizes)
    return uniform_shape(size, num_heads, num_ffn, kept, head_width or None)


def ffn_room(
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


@dataclass(frozen=True)
class _Blocks:
    """Units gathered into rounding blocks, in the order in which they are taken."""

    benefit: Tensor  # (num_blocks,)
    part: Tensor  # (num_blocks,) position of the sub-layer
    layer: Tensor  # (num_blocks,)
    size: Tensor  # (num_blocks,) units in the block

    def of(self, present: Tensor) -> _Blocks:
        """Those of these sub-layers, `(L, 2)` bool; the first of each comes before all others."""
        stay = present[self.layer, self.part]
        return _Blocks(*(c[stay] for c in (self.benefit, self.part, self.layer, self.size)))


def _blocks(ranking: Ranking) -> _Blocks:
    columns: list[tuple[Tensor, ...]] = []  # order, benefit, sub-layer, layer, size
    for index, part in enumerate(Sublayer):
        axis = UNIT_AXIS[part]
        num_layers, units = ranking.scores[axis].shape
        step = min(ranking.multiples[axis], units) if axis.value in ranking.pruned else units
        num = -(-units // step)
        size = torch.full((num,), step).index_fill_(
            0, torch.tensor(num - 1), units - (num - 1) * step
        )
        sums = [
            nn.functional.pad(
                values[axis].gather(1, ranking.order[axis]), (0, num * step - units)
            ).view(-1, num, step).sum(2)
            for values in (ranking.scores, ranking.benefits)
        ]  # fmt: skip
        means = sums[0] / size
        means[:, 0] = torch.inf
        grid = means.shape
        columns.append(
            (
                means.flatten(),
                sums[1].flatten(),
                torch.full_like(means, index, dtype=torch.long).flatten(),
                torch.arange(num_layers)[:, None].expand(grid).flatten(),
                size.expand(grid).flatten(),
            )
        )
    means, benefit, parts, layer, size = map(torch.cat, zip(*columns, strict=True))
    ranks = means.argsort(descending=True, stable=True)
    return _Blocks(benefit[ranks], parts[ranks], layer[ranks], size[ranks])


class _Spending:
    """What the leading blocks cost, under every limit and for each of some hidden sizes."""

    def __init__(self, blocks: _Blocks, hidden: Tensor, present: Tensor, problem: Problem) -> None:
        self._units = [(blocks.size * (blocks.part == i)).cumsum(0) for i in range(len(Sublayer))]
        self._rows: list[tuple[float, Tensor, list[Tensor]]] = []  # target, fixed, prices
        for limit in problem.limits:
            fixed, prices = torch.as_tensor(limit.cost.outside(hidden)), []
            for index, part in enumerate(Sublayer):
                base = limit.cost.part(part, hidden, 0)
                prices.append(limit.cost.part(part, hidden, 1) - base)
                fixed = fixed + int(present[:, index].sum()) * base
            self._rows.append((limit.budget.target, fixed, prices))

    def left(self, num: Tensor) -> Tensor:
        """What every limit leaves after this many blocks, `(num_limits, num_hidden_sizes)`."""
        units = [part[num - 1] for part in self._units]
        return torch.stack(
            [
                target
                - fixed
                - sum(price * count for price, count in zip(prices, units, strict=True))
                for target, fixed, prices in self._rows
            ]
        )

    def num_within(self, num_blocks: int) -> Tensor:
        """Leading blocks that every limit admits, `(num_hidden_sizes,)`, by bisection."""
        low = torch.zeros_like(self._rows[0][1], dtype=torch.long)
        high = torch.full_like(low, num_blocks)
        while bool((low < high).any()):
            middle = (low + high + 1) // 2
            fits = (self.left(middle) >= 0).all(0)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
        return low


def choose_free(ranking: Ranking, present: Tensor, problem: Problem) -> Shape | None:
    """Counts free in every layer: for each hidden size the best-scored units that fit.

    Args:
        ranking: of all units.
        present: which sub-layers stay, `(L, 2)` bool.
        problem: model, budget, rounding and layout.
    """
    blocks = ranking.blocks.of(present)
    num_blocks = len(blocks.size)
    options = problem.counts(Axis.HIDDEN, Axis.HIDDEN in ranking.pruned)
    hidden = torch.tensor(options)
    spending = _Spending(blocks, hidden, present, problem)
    num = spending.num_within(num_blocks)
    possible = num >= max(1, int(present.sum()))  # every sub-layer keeps a block
    if not bool(possible.any()):
        return None
    # With every block taken nothing can fill what is left of the budget.
    targets = torch.tensor([[limit.budget.target] for limit in problem.limits])
    unused = spending.left(torch.full_like(num, num_blocks)) / targets
    is_close = (num < num_blocks) | (unused <= TOLERANCE).any(0)
    if bool((possible & is_close).any()):
        possible &= is_close
    gains = ranking.gains[Axis.HIDDEN][hidden - 1] + blocks.benefit.cumsum(0)[num - 1]
    best = int(gains.masked_fill(~possible, -torch.inf).argmax())
    return _fill(blocks, options[best], int(num[best]), spending.left(num)[:, best], problem)


def _fill(blocks: _Blocks, hidden: int, num: int, rooms: Tensor, problem: Problem) -> Shape:
    """Takes the leading blocks, then any later one that still fits into what they leave."""
    limits = problem.limits
    prices = [
        [limit.cost.part(part, hidden, 1) - limit.cost.part(part, hidden, 0) for limit in limits]
        for part in Sublayer
    ]
    left = rooms.tolist()
    taken = list(range(num))
    closed: set[tuple[int, int]] = set()  # after a block, only the next one of its row may follow
    later = (column[num:].tolist() for column in (blocks.part, blocks.layer, blocks.size))
    for i, (part, layer, size) in enumerate(zip(*later, strict=True), start=num):
        if (part, layer) in closed:
            continue
        after = [room - price * size for room, price in zip(left, prices[part], strict=True)]
        if min(after) >= 0:
            taken.append(i)
            left = after
        else:
            closed.add((part, layer))
    counts = torch.zeros(len(Sublayer), problem.architecture.num_layers, dtype=torch.long)
    index = torch.tensor(taken)
    counts.index_put_(
        (blocks.part[index], blocks.layer[index]), blocks.size[index], accumulate=True
    )
    heads, ffn = counts.tolist()
    return Shape(hidden, tuple(heads), tuple(ffn))
