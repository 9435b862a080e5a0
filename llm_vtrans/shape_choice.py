"""Which counts of units a budget admits, and which of these counts have the largest benefit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_vtrans.families.base import UNIT_AXIS, Axis, Shape, Sublayer
from llm_vtrans.problem import TOLERANCE, Problem, uniform_shape


@dataclass(frozen=True)
class Ranking:
    """What the choice goes by.

    Attributes:
        scores: of the units of every structure, float64; within a layer the best ones stay.
        benefits: of the same units; their sum is maximised.
        present: which sub-layers stay, `(L, 2)` bool.
        pruned: structures of which units may go.
    """

    scores: Mapping[str, Tensor]
    benefits: Mapping[str, Tensor]
    present: Tensor
    pruned: frozenset[str]


def choose_uniform(ranking: Ranking, problem: Problem) -> Shape | None:
    """One head count and one FFN count for every kept layer, by enumeration."""
    kept = ranking.present.any(dim=1)
    num_kept = int(kept.sum())
    options = {
        axis: problem.counts(axis, axis in ranking.pruned)
        for axis in (Axis.HIDDEN, *UNIT_AXIS.values())
    }

    def gain(axis: Axis) -> Tensor:  # best n units of every kept layer, for each allowed n
        ranked = ranking.benefits[axis][kept].sort(dim=1, descending=True).values.cumsum(1).sum(0)
        return ranked[torch.tensor(options[axis]) - 1]

    hidden = torch.tensor(options[Axis.HIDDEN])
    ffn_options = torch.tensor(options[Axis.FFN])
    hidden_gain, ffn_gain = _hidden_gain(ranking.benefits, options[Axis.HIDDEN]), gain(Axis.FFN)
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
            shape = uniform_shape(int(hidden[i]), heads, ffn, kept, width)
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


@dataclass(frozen=True)
class _Blocks:
    """Units gathered into rounding blocks, in the order in which they are taken."""

    benefit: Tensor  # (num_blocks,)
    is_ffn: Tensor  # (num_blocks,) bool
    layer: Tensor  # (num_blocks,)
    size: Tensor  # (num_blocks,) units in the block
    num_forced: int  # leading blocks that every plan contains


def _blocks(ranking: Ranking, problem: Problem) -> _Blocks:
    rows: list[tuple[float, float, int, int, int]] = []  # order, benefit, ffn?, layer, size
    for index, part in enumerate(Sublayer):
        axis = UNIT_AXIS[part]
        units = problem.architecture.num_units[axis]
        step = min(problem.multiple(axis), units) if axis.value in ranking.pruned else units
        for layer in torch.nonzero(ranking.present[:, index]).flatten().tolist():
            order = ranking.scores[axis][layer].argsort(descending=True)
            for rank, chunk in enumerate(order.split(step)):
                score = torch.inf if rank == 0 else float(ranking.scores[axis][layer][chunk].mean())
                benefit = float(ranking.benefits[axis][layer][chunk].sum())
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


def choose_free(ranking: Ranking, problem: Problem) -> Shape | None:
    """Counts free in every layer: for each hidden size the best-scored units that fit."""
    blocks = _blocks(ranking, problem)
    units = {
        Sublayer.ATTENTION: (blocks.size * ~blocks.is_ffn).cumsum(0),
        Sublayer.FFN: (blocks.size * blocks.is_ffn).cumsum(0),
    }
    gains = blocks.benefit.cumsum(0)
    hidden_options = problem.counts(Axis.HIDDEN, Axis.HIDDEN in ranking.pruned)
    best: tuple[tuple[bool, float], int, Tensor] | None = None
    for hidden, hidden_gain in zip(
        hidden_options, _hidden_gain(ranking.benefits, hidden_options).tolist(), strict=True
    ):
        rows = []
        for limit in problem.limits:
            row = torch.as_tensor(limit.cost.outside(hidden)).expand(len(gains))
            for index, part in enumerate(Sublayer):
                base = limit.cost.part(part, hidden, 0)
                slope = limit.cost.part(part, hidden, 1) - base
                row = row + int(ranking.present[:, index].sum()) * base + slope * units[part]
            rows.append(row)
        spent = torch.stack(rows)
        num = _num_within(spent, problem)
        if num < blocks.num_forced:
            continue
        # With every block taken nothing can fill what is left of the budget.
        is_close = num < len(gains) or any(
            row[-1].item() >= (1 - TOLERANCE) * limit.budget.target
            for row, limit in zip(spent, problem.limits, strict=True)
        )
        rank = (is_close, hidden_gain + float(gains[num - 1]))
        if best is None or rank > best[0]:
            best = (rank, hidden, spent)
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
    targets = spent.new_tensor([[limit.budget.target] for limit in problem.limits])
    return int(torch.searchsorted(spent, targets, right=True).min())


def _fill(blocks: _Blocks, hidden: int, spent: Tensor, problem: Problem) -> Shape:
    """Takes blocks in order while they fit, then any later one that still does."""
    limits = problem.limits
    num = _num_within(spent, problem)
    taken = list(range(num))
    rooms = [limit.budget.target - spent[i, num - 1].item() for i, limit in enumerate(limits)]
    prices = {
        part: [
            limit.cost.part(part, hidden, 1) - limit.cost.part(part, hidden, 0) for limit in limits
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


def _hidden_gain(benefits: Mapping[str, Tensor], counts: list[int]) -> Tensor:
    """Summed benefit of the best `n` hidden dimensions for each `n` in `counts`."""
    ranked = benefits[Axis.HIDDEN].sort(descending=True).values.cumsum(0)
    return ranked[torch.tensor(counts) - 1]
