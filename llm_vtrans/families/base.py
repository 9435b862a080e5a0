"""What the core knows of a model family: a table of labelled tensors and a config writer.

Each parameter is one row. The labels say which prunable axis every dimension
belongs to and how the tensor touches the residual stream; counting, masking,
rotating and exporting all read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES


class Axis(StrEnum):
    """A prunable axis; the values are the names that `--prune` takes."""

    HIDDEN = "hidden"
    HEADS = "heads"  # key/value groups: a group goes with all query heads that share it
    FFN = "ffn"
    HEAD_DIM = "head_dim"  # inside every head, where a stock config ties it to the hidden size


class Role(StrEnum):
    """What a block of head entries is; heads of which the roles are known can be re-based."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"


class Norm(StrEnum):
    """How a family normalises the residual stream."""

    RMS = "rms"
    LAYER = "layer"  # subtracts a mean, so it has to run over the kept dimensions only


class Sublayer(StrEnum):
    """The two residual branches of a transformer layer, in the order of execution."""

    ATTENTION = "attention"
    FFN = "ffn"

    @property
    def order(self) -> int:
        """Its place in a layer, from 0."""
        return list(Sublayer).index(self)


UNIT_AXIS = {Sublayer.ATTENTION: Axis.HEADS, Sublayer.FFN: Axis.FFN}
UNIT_AXES = (Axis.HIDDEN, *UNIT_AXIS.values())  # those of which a plan keeps some units


class Stream(StrEnum):
    """How a tensor's hidden dimension meets the residual stream."""

    WRITES = "writes"
    JOINS = "joins"  # added to the stream in front of a post-norm, which gates it
    READS = "reads"
    TAKES = "takes"  # reads what a head of the model computed in the same width
    SCALES = "scales"  # a norm's weight, multiplied into the normalised stream
    SHIFTS = "shifts"  # a norm's bias
    RENEWS = "renews"  # weight or bias of a post-norm: its output is the stream
    APART = "apart"


class Place(StrEnum):
    """Where along the depth of a network a tensor meets the residual stream."""

    START = "start"  # embeddings write
    WRITE = "write"  # layers write
    READ = "read"  # layers read
    END = "end"  # the head reads


@dataclass(frozen=True)
class Dim:
    """One tensor dimension: its size and the prunable axis it belongs to, if any.

    Attributes:
        size: entries in the dense checkpoint.
        axis: prunable axis, or None.
        roles: of the consecutive blocks, each over all heads, that a head dimension consists
            of: one, or three where query, key and value are fused. Empty where nothing inside
            a head can change, as rotary positions pair its entries.
    """

    size: int
    axis: Axis | None = None
    roles: tuple[Role, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks that each hold every unit of the axis."""
        return max(1, len(self.roles))


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the checkpoint; `{}` in a name is the layer index.

    Attributes:
        name: name in the checkpoint, a template for tensors inside layers.
        dims: labelled dimensions in storage order.
        stream: how the hidden dimension meets the residual stream.
        sublayer: the residual branch the tensor goes with; None outside the layers.
        norm: name of the norm in front of a reader, whose weight rotation folds.
        reader: of a bias, name of the weight behind which it is added, where that reads the
            stream through a norm with a bias: rotation folds that bias here.
        is_lookup: True for embedding tables, which cost no multiply-accumulates.
        offset: added to a norm's stored weight when it is used.
        grows_with_width: True for a table whose rows the model multiplies by the root of its
            `hidden_size`.
        positions: tokens of a sequence that the product is computed for; None for all.
    """

    name: str
    dims: tuple[Dim, ...]
    stream: Stream = Stream.APART
    sublayer: Sublayer | None = None
    norm: str | None = None
    reader: str | None = None
    is_lookup: bool = False
    offset: float = 0.0
    grows_with_width: bool = False
    positions: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions in the dense checkpoint."""
        return tuple(dim.size for dim in self.dims)

    @property
    def is_write(self) -> bool:
        """Whether it adds to the residual stream."""
        return self.stream in (Stream.WRITES, Stream.JOINS)

    @property
    def place(self) -> Place:
        """Where it writes, or where what it belongs to is read: a norm comes before readers."""
        if self.sublayer is None:
            return Place.START if self.is_write else Place.END
        return Place.WRITE if self.is_write else Place.READ

    def depth(self, layer: int) -> int:
        """Sub-layers in front of the one that it goes with, from the network's first on."""
        assert self.sublayer is not None
        return layer * len(Sublayer) + self.sublayer.order

    def dim_of(self, axis: Axis) -> int | None:
        """Index of the dimension that belongs to `axis`, or None.

        A head's layer may be as wide as the stream: what it reads comes last.
        """
        found = [i for i, dim in enumerate(self.dims) if dim.axis is axis]
        return found[-1] if found else None


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
        norm: of the residual stream.
        couples_heads: the stock config knows no `head_dim`: heads times their width must be
            the hidden size, so that layout prunes dimensions inside heads, too.
        divides_hidden: query heads of a unit of the heads' axis, where the number of all must
            divide the hidden size in the stock layout; else None.
        rotates: whether norms come in front of what reads the stream, and all that they multiply
            by and add can be folded there or stay beside a tied head (see ROTATE).
    """

    num_layers: int
    num_units: Mapping[Axis, int]
    tensors: tuple[TensorSpec, ...]
    final_norm: str
    tied_head: str | None
    max_positions: int
    norm: Norm = Norm.RMS
    couples_heads: bool = False
    divides_hidden: int | None = None
    rotates: bool = False

    @property
    def is_post_norm(self) -> bool:
        """Whether layers read the stream itself, as norms come behind what joins it."""
        return any(spec.stream is Stream.RENEWS and spec.sublayer for spec in self.tensors)

    def units_per(self, dim: Dim) -> int:
        """Consecutive entries of a block that one unit of the dimension's axis covers."""
        return 1 if dim.axis is None else dim.size // dim.num_blocks // self.num_units[dim.axis]

    @property
    def num_parameters(self) -> int:
        """Of the dense model, tied ones once."""
        return sum(prod(spec.shape) for spec, _ in self.named_tensors().values())

    @property
    def embedding(self) -> TensorSpec:
        """The token table, which a tied head shares."""
        return next(spec for spec in self.tensors if spec.is_lookup)

    def row(self, name: str) -> TensorSpec:
        """The row of a name, which inside layers is a template."""
        return next(spec for spec in self.tensors if spec.name == name)

    def is_final_norm(self, spec: TensorSpec) -> bool:
        """Whether a row is the weight or bias of the norm in front of the output head."""
        return spec.name.rpartition(".")[0] == self.final_norm.rpartition(".")[0]

    @property
    def head_dim(self) -> int | None:
        """Entries of one head where they can be re-based, else None."""
        dims = (dim for spec in self.tensors for dim in spec.dims if dim.roles)
        return next((self.units_per(dim) for dim in dims), None)

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
        head_dim: kept dimensions of every head; None keeps all.
    """

    hidden: int
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    head_dim: int | None = None

    def __str__(self) -> str:
        heads, ffn = max(self.heads, default=0), max(self.ffn, default=0)
        return f"hidden {self.hidden}, heads {heads}, FFN {ffn} in {len(self.kept_layers)} layers"

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
        ignored: suffixes of checkpoint entries that no forward pass of ours reads (buffers of
            old versions, a pooler that the head does not use).
        base_prefix: what tensor names begin with in a model with a head; published checkpoints
            of the bare model lack it.
        renames: old endings of tensor names and what they are today.
    """

    model_types: tuple[str, ...]
    describe: Callable[[Any], Architecture]
    stock_config: Callable[[dict[str, Any], Shape], dict[str, Any]]
    per_layer_config: Callable[[dict[str, Any], Shape], dict[str, Any]]
    ignored: tuple[str, ...] = field(default=())
    base_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()

    def canonical(self, stored: Iterable[str]) -> dict[str, str]:
        """Name in a model with a head -> name in the checkpoint."""
        names: dict[str, str] = {}
        is_bare = not any(name.startswith(self.base_prefix) for name in stored)
        for name in stored:
            new = f"{self.base_prefix}{name}" if is_bare else name
            for old, now in self.renames:
                new = f"{new.removesuffix(old)}{now}" if new.endswith(old) else new
            names[new] = name
        return names


def head_of(config: Any) -> str:
    """Ending of the class that a checkpoint was saved from, such as `ForMaskedLM`.

    Args:
        config: parsed by `transformers`; without `architectures` it is a causal LM's.

    Raises:
        UserError: a class whose head no adapter knows.
    """
    name = next(iter(config.architectures or ("ForCausalLM",)))
    for ending in AUTO_CLASSES:
        if name.endswith(ending):
            return ending
    raise UserError(
        f"config.json names {name}, of which no head can be kept; supported are classes that end "
        f"in {', '.join(AUTO_CLASSES)} (--finetune-first gives a bare model a head)"
    )


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
