"""A latency budget: times measured on the device stand where counts stand for other budgets.

A table of a few networks of the family, timed on the device, gives what a head, an FFN unit, a
sub-layer and all outside the layers take at some hidden sizes; between those it is
interpolated, so that the same search and the same choice of a shape serve all budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from llm_vtrans.budget.cost import Cost, dense_shape
from llm_vtrans.families.base import Architecture, Axis, Shape, Sublayer

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the hidden size: where the table is measured
DEPTH = 3  # layers of the networks in it
LEAST = 1e-3  # ns that a unit takes at least: timing noise must not make it a gain
STEEPEST = 5.0  # times as much as in the table may a unit take in a network that was timed

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
        extra: what is added to it then.
    """

    sizes: tuple[int, ...]
    times: tuple[Times, ...]
    head_dim: int | None = None
    factor: float = 1.0
    extra: float = 0.0

    def outside(self, hidden: Any) -> Any:
        """As `Cost.outside`, in nanoseconds."""
        return self.extra + self._at([times.outside for times in self.times], hidden)

    def part(self, sublayer: Sublayer, hidden: Any, units: Any, head_dim: Any = None) -> Any:
        """As `Cost.part`, in nanoseconds; a head takes time by its dimensions."""
        index = sublayer.order
        if sublayer is Sublayer.ATTENTION and head_dim is not None and self.head_dim is not None:
            units = units * head_dim / self.head_dim
        base = self._at([times.bases[index] for times in self.times], hidden)
        return base + units * self._at([times.units[index] for times in self.times], hidden)

    def corrected(self, shape: Shape, found: float) -> LatencyCost:
        """The same times in proportion, such that this shape takes what was found."""
        ratio = found / self.of(shape)
        return replace(self, factor=ratio * self.factor, extra=ratio * self.extra)

    def through(self, one: tuple[Shape, float], other: tuple[Shape, float]) -> LatencyCost:
        """The same times, such that two shapes take what was found: in proportion and by a sum.

        Times that say little about it, as the shapes are too near, correct it by the other alone.
        """
        (first, least), (second, most) = one, other
        difference = self.of(second) - self.of(first)
        slope = (most - least) / difference if difference else 0.0
        if not 1 / STEEPEST < slope < STEEPEST:
            return self.corrected(second, most)
        steeper = self.corrected(second, slope * self.of(second))
        return replace(steeper, extra=steeper.extra + most - steeper.of(second))

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
