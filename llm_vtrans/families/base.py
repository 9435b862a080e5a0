"""What the core knows of a model family: a table of labelled tensors and a config writer.

Each parameter is one row. The labels say which prunable axis every dimension
belongs to and how the tensor touches the residual stream; counting, masking,
rotating and exporting all read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llm_vtrans.errors import UserError


class Axis(StrEnum):
    """A prunable axis; the values are the names that `--prune` takes."""

    HIDDEN = "hidden"
    HEADS = "heads"  # key/value groups: a group goes with all query heads that share it
    FFN = "ffn"


class Sublayer(StrEnum):
    """The two residual branches of a transformer layer, in the order of execution."""

    ATTENTION = "attention"
    FFN = "ffn"


UNIT_AXIS = {Sublayer.ATTENTION: Axis.HEADS, Sublayer.FFN: Axis.FFN}


class Stream(StrEnum):
    """How a tensor's hidden dimension meets the residual stream."""

    WRITES = "writes"
    READS = "reads"
    SCALES = "scales"  # a norm's weight, multiplied into the normalised stream
    APART = "apart"


@dataclass(frozen=True)
class Dim:
    """One tensor dimension: its size and the prunable axis it belongs to, if any."""

    size: int
    axis: Axis | None = None


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the checkpoint; `{}` in a name is the layer index.

    Attributes:
        name: name in the checkpoint, a template for tensors inside layers.
        dims: labelled dimensions in storage order.
        stream: how the hidden dimension meets the residual stream.
        sublayer: the residual branch the tensor goes with; None outside the layers.
        norm: name of the norm in front of a reader, whose weight rotation folds.
        is_lookup: True for embedding tables, which cost no multiply-accumulates.
    """

    name: str
    dims: tuple[Dim, ...]
    stream: Stream = Stream.APART
    sublayer: Sublayer | None = None
    norm: str | None = None
    is_lookup: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions in the dense checkpoint."""
        return tuple(dim.size for dim in self.dims)

    def dim_of(self, axis: Axis) -> int | None:
        """Index of the dimension that belongs to `axis`, or None."""
        return next((i for i, dim in enumerate(self.dims) if dim.axis is axis), None)


@dataclass(frozen=True)
class Architecture:
    """The anatomy of one concrete model: sizes of its axes and all its tensors.

    Attributes:
        num_layers: transformer layers, all of one shape.
        num_units: units of each axis (per layer for heads and FFN).
        tensors: one row per parameter; tied parameters appear once.
        final_norm: name of the norm in front of the output head.
        tied_head: name that shares the embedding's storage, or None.
        max_positions: longest sequence the model was built for, in tokens.
    """

    num_layers: int
    num_units: Mapping[Axis, int]
    tensors: tuple[TensorSpec, ...]
    final_norm: str
    tied_head: str | None
    max_positions: int

    def units_per(self, dim: Dim) -> int:
        """Consecutive tensor entries that one unit of the dimension's axis covers."""
        return 1 if dim.axis is None else dim.size // self.num_units[dim.axis]

    def named_tensors(self) -> dict[str, tuple[TensorSpec, int | None]]:
        """Every concrete tensor name with its row and layer index (None outside layers)."""
        outer = {t.name: (t, None) for t in self.tensors if t.sublayer is None}
        layers = {
            t.name.format(layer): (t, layer)
            for layer in range(self.num_layers)
            for t in self.tensors
            if t.sublayer is not None
        }
        return {**outer, **layers}


@dataclass(frozen=True)
class Shape:
    """Counts of kept units: what a pruned model's config must express.

    Attributes:
        hidden: kept hidden dimensions.
        heads: kept key/value groups per original layer; 0 removes the attention sub-layer.
        ffn: kept FFN units per original layer; 0 removes the FFN sub-layer.
    """

    hidden: int
    heads: tuple[int, ...]
    ffn: tuple[int, ...]

    def units(self, sublayer: Sublayer) -> tuple[int, ...]:
        """Kept units per layer of one kind of sub-layer."""
        return self.heads if sublayer is Sublayer.ATTENTION else self.ffn

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original indices of the layers of which at least one sub-layer stays."""
        return tuple(i for i, n in enumerate(zip(self.heads, self.ffn, strict=True)) if any(n))

    @property
    def is_uniform(self) -> bool:
        """Whether one count per axis describes every kept layer."""
        kept = {(self.heads[i], self.ffn[i]) for i in self.kept_layers}
        return len(kept) == 1 and all(all(counts) for counts in kept)


@dataclass(frozen=True)
class Family:
    """All that is particular to one model family.

    Attributes:
        model_types: values of `config.model_type` that the family covers.
        describe: config -> `Architecture`; raises UserError for variants not supported.
        stock_config: (config dict, shape) -> config dict loadable by stock `transformers`.
        per_layer_config: the same with one shape per layer.
        rotates: whether an orthogonal change of basis of the stream leaves the function as it
            is (true of RMSNorm, not of LayerNorm).
        ignored: suffixes of checkpoint entries that are no parameters (old rotary buffers).
    """

    model_types: tuple[str, ...]
    describe: Callable[[Any], Architecture]
    stock_config: Callable[[dict[str, Any], Shape], dict[str, Any]]
    per_layer_config: Callable[[dict[str, Any], Shape], dict[str, Any]]
    rotates: bool = False
    ignored: tuple[str, ...] = field(default=())


_REGISTRY: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family under each of its model types."""
    _REGISTRY.update(dict.fromkeys(family.model_types, family))
    return family


def family_for(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        UserError: the type is unknown; the message lists the supported ones.
    """
    if model_type not in _REGISTRY:
        raise UserError(
            f"model type {model_type!r} is not supported; supported are "
            f"{', '.join(sorted(_REGISTRY))} (a new family is one adapter in llm_vtrans/families)"
        )
    return _REGISTRY[model_type]
