"""Exact and expected cost of a pruned model, and the Lagrangian that drives one to the other.

Costs are polynomials in the numbers of kept units, read off the family's tensor
table once; the same polynomial counts a finished shape in integers and gives the
differentiable expectation during training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.families.base import UNIT_AXIS, Architecture, Axis, Dim, Shape, Sublayer

UNIFORM_POWER = 8  # between the mean (1) and the maximum (infinity) over layers
DAMPING = 100.0  # nats per squared share of the budget

Monomials = Mapping[tuple[Axis, ...], int]  # axes multiplied together, in order -> coefficient


class Cost:
    """What a network costs: outside the layers, and a part in each sub-layer that stays.

    A part grows linearly with the units that the sub-layer keeps.
    """

    def outside(self, hidden: Any) -> Any:
        """Cost outside the layers for `hidden` kept dimensions (number or tensor)."""
        raise NotImplementedError

    def part(self, sublayer: Sublayer, hidden: Any, units: Any, head_dim: Any = None) -> Any:
        """Cost of one sub-layer with `units` kept heads or FFN units (numbers or tensors)."""
        raise NotImplementedError

    def of(self, shape: Shape) -> int:
        """Exact cost of a finished shape; a sub-layer without units is gone and costs nothing."""
        return sum(self.split(shape).values())

    def split(self, shape: Shape) -> dict[str, int]:
        """Cost of a finished shape by part of the network: `embeddings`, `attention`, `ffn`.

        What lies outside the layers counts as embeddings: tables, output head, final norm.
        """
        layers = {
            part.value: sum(
                int(self.part(part, shape.hidden, units, shape.head_dim))
                for units in shape.units(part)
                if units
            )
            for part in Sublayer
        }
        return {"embeddings": int(self.outside(shape.hidden)), **layers}

    def expected(self, keep: Mapping[str, Tensor], is_uniform: bool = False) -> Tensor:
        """Expected cost under independent probabilities to keep, differentiable, shape `()`.

        Args:
            keep: probabilities `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`, `layers (L, 2)`.
            is_uniform: all layers must end with one count, so that the widest decide: count
                each at the power mean over layers, close to the maximum. Pressure then falls
                on the widest layers, and narrow ones may grow back at no cost.
        """
        hidden = keep[Axis.HIDDEN].sum()
        total = self.outside(hidden)
        for index, part in enumerate(Sublayer):
            units, present = keep[UNIT_AXIS[part]].sum(dim=1), keep["layers"][:, index]
            if is_uniform:
                units = _power_mean(units, present)
            total = total + (present * self.part(part, hidden, units)).sum()
        return total


@dataclass(frozen=True)
class Count(Cost):
    """A count that is a sum of products of kept units.

    Attributes:
        outer: terms outside the layers.
        parts: terms of one sub-layer, the same in each layer that keeps it.
        head_dim: dimensions of a head unless a shape says otherwise.
    """

    outer: Monomials
    parts: Mapping[Sublayer, Monomials]
    head_dim: int | None = None

    def outside(self, hidden: Any) -> Any:
        """As `Cost.outside`, exact for integers."""
        return _evaluate(self.outer, {Axis.HIDDEN: hidden})

    def part(self, sublayer: Sublayer, hidden: Any, units: Any, head_dim: Any = None) -> Any:
        """As `Cost.part`, exact for integers."""
        counts = {
            Axis.HIDDEN: hidden,
            UNIT_AXIS[sublayer]: units,
            Axis.HEAD_DIM: self.head_dim if head_dim is None else head_dim,
        }
        return _evaluate(self.parts[sublayer], counts)


def _power_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted power mean of exponent `UNIFORM_POWER`, shape `()`, scaled against overflow."""
    largest = values.detach().max().clamp(min=1e-6)
    powers = (values / largest).pow(UNIFORM_POWER)
    mean = (weights * powers).sum() / weights.sum().clamp(min=1e-6)
    return largest * mean.clamp(min=1e-12).pow(1 / UNIFORM_POWER)


def _evaluate(terms: Monomials, counts: Mapping[Axis, Any]) -> Any:
    total: Any = 0
    for axes, coefficient in terms.items():
        term: Any = coefficient
        for axis in axes:
            term = term * counts[axis]
        total = total + term
    return total


def _monomial(architecture: Architecture, dims: Iterable[Dim]) -> tuple[tuple[Axis, ...], int]:
    axes: list[Axis] = []
    coefficient = 1
    for dim in dims:
        if dim.axis is None:
            coefficient *= dim.size
        elif dim.roles:
            axes += [dim.axis, Axis.HEAD_DIM]
            coefficient *= dim.num_blocks
        else:
            axes.append(dim.axis)
            coefficient *= architecture.units_per(dim)
    return tuple(sorted(axes)), coefficient


def parameter_cost(architecture: Architecture) -> Cost:
    """Number of parameters, embeddings and output head included, tied weights once."""
    outer: Counter[tuple[Axis, ...]] = Counter()
    parts: dict[Sublayer, Counter[tuple[Axis, ...]]] = {part: Counter() for part in Sublayer}
    for spec in architecture.tensors:
        axes, coefficient = _monomial(architecture, spec.dims)
        (outer if spec.sublayer is None else parts[spec.sublayer])[axes] += coefficient
    return Count(outer, parts, architecture.head_dim)


def mac_cost(architecture: Architecture, seq_len: int) -> Cost:
    """Multiply-accumulates of one forward pass over one sequence of `seq_len` tokens.

    Every matrix product counts, a language model's head at every position and both attention
    products over the full `seq_len x seq_len` square included; element-wise work does not.
    """
    outer: Counter[tuple[Axis, ...]] = Counter()
    parts: dict[Sublayer, Counter[tuple[Axis, ...]]] = {part: Counter() for part in Sublayer}
    for spec in architecture.tensors:
        is_tied_head = spec is architecture.embedding and architecture.tied_head is not None
        if len(spec.dims) != 2 or (spec.is_lookup and not is_tied_head):
            continue
        axes, coefficient = _monomial(architecture, spec.dims)
        positions = spec.positions or seq_len
        (outer if spec.sublayer is None else parts[spec.sublayer])[axes] += coefficient * positions
        if spec.sublayer is Sublayer.ATTENTION and spec.is_write:
            heads = (dim for dim in spec.dims if dim.axis is Axis.HEADS)
            axes, width = _monomial(architecture, heads)
            parts[Sublayer.ATTENTION][axes] += 2 * seq_len**2 * width
    return Count(outer, parts, architecture.head_dim)


def dense_shape(architecture: Architecture) -> Shape:
    """The shape with every unit kept."""
    units, layers = architecture.num_units, architecture.num_layers
    return Shape(units[Axis.HIDDEN], (units[Axis.HEADS],) * layers, (units[Axis.FFN],) * layers)


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost at most.

    Attributes:
        kind: `params`, `MACs` or `ns`, the nanoseconds of a pass.
        target: largest allowed cost.
        dense: cost of the dense model.
        asked: what the user allows where the target stays below it, as times differ when they
            are measured again.
    """

    kind: str
    target: int
    dense: int
    asked: int | None = None

    @property
    def allowed(self) -> int:
        """What the user allows."""
        return self.target if self.asked is None else self.asked

    def record(self, achieved: int) -> dict[str, str | int]:
        """For the manifest: what was allowed and what came out."""
        return {
            "kind": self.kind, "target": self.allowed, "dense": self.dense, "achieved": achieved,
        }  # fmt: skip

    def text(self, cost: int) -> str:
        """A cost of this kind for people."""
        return f"{cost / 1e6:,.3f} ms" if self.kind == "ns" else f"{cost:,} {self.kind}"

    @property
    def sparsity(self) -> float:
        """Share of the dense cost that must go."""
        return 1 - self.target / self.dense


@dataclass(frozen=True)
class Limit:
    """A budget and what it counts; of several, the tighter binds.

    Attributes:
        cost: the count.
        budget: how large it may become.
    """

    cost: Cost
    budget: Budget


class Lagrangian(nn.Module):
    """Damped multiplier of an equality constraint: `multiplier * r + DAMPING * r^2`.

    The modified differential method of multipliers (Platt and Barr, NIPS 1987): the square
    pushes back at once and in proportion to the residual `r`, the multiplier ascends by `r` a
    step and takes over what is needed for good. Multipliers that only ascend (CoFi) are still
    growing when the masks already follow, and units that an overshoot takes do not come back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplier = nn.Parameter(torch.zeros(()))

    def forward(self, residual: Tensor) -> Tensor:
        """Penalty for a residual, both of shape `()`."""
        return self.multiplier * residual + DAMPING * residual.square()

    def parameter_group(self) -> dict[str, Any]:
        """For an optimizer of Adam's kind: `eps` far above the gradient makes its steps plain."""
        plain = {"lr": 1.0, "betas": (0.0, 0.999), "eps": 1.0}
        return {"params": [self.multiplier], "maximize": True, **plain}


def complete(keep: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Fills structures without masks with ones and broadcasts `layers` to `(L, 2)`.

    A `layers` mask of shape `(L, 1)` (the stock layout, where a layer goes as a whole)
    serves both sub-layers.
    """
    num_layers, units = architecture.num_layers, architecture.num_units
    shapes = {
        Axis.HIDDEN.value: (units[Axis.HIDDEN],),
        Axis.HEADS.value: (num_layers, units[Axis.HEADS]),
        Axis.FFN.value: (num_layers, units[Axis.FFN]),
        "layers": (num_layers, 2),
    }
    some = next(iter(keep.values()))
    return {
        name: keep[name].expand(shape) if name in keep else some.new_ones(shape)
        for name, shape in shapes.items()
    }
