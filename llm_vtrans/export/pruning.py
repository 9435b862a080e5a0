"""EXPORT: plan + original shards -> smaller shards, one tensor at a time.

The exported dense network computes the same function as the hard-masked one:

- gates and trained factors are folded once, into the tensors that write to the residual
  stream and into the norms;
- an RMSNorm over `d'` of `d` dimensions sees `d / d'` times the mean square, so what
  writes to the stream is scaled by `sqrt(d' / d)` and norm weights by its inverse. The
  norm's epsilon then stays as it is (METHOD: scaling epsilon instead would also reach the
  per-head norms of families that share it). A LayerNorm was trained over the kept
  dimensions and needs none of this, but for the length of what it gives after a rotation;
- a tied head reads through the folded embedding, which the final norm undoes;
- where dimensions inside heads go, the rest is written in the plan's basis of each head.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.rotation import Basis, select_hidden
from llm_vtrans.export import per_layer_modeling
from llm_vtrans.export.shard_writer import ShardWriter
from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Dim,
    Family,
    Norm,
    Stream,
    TensorSpec,
)
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.loading.model import norm_weight, stored_name, with_norm_bias
from llm_vtrans.loading.shaped import shaped_config
from llm_vtrans.masking.tuning import INPUT, OUTPUT, SHIFT, scale_name

CHUNK_BYTES = 16 * 2**20  # of a vocabulary matrix held in float32 at a time
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Pruning:
    """A plan bound to the checkpoint it prunes.

    Attributes:
        source: the dense shards.
        architecture: the table, after rotation if there is one.
        plan: kept units and gates.
        basis: of the residual stream, or None.
        dtype: of the written tensors; None keeps each tensor's own.
        scales: factors `(width,)` by `scale_name`; ones where missing.
        device: that computes, one tensor at a time.
    """

    source: Checkpoint
    architecture: Architecture
    plan: PrunePlan
    basis: Basis | None = None
    dtype: torch.dtype | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it is immutable

    def tensors(self) -> dict[str, tuple[str, TensorSpec, int | None]]:
        """Written name -> (source name, row, original layer), in writing order."""
        shape = self.plan.shape
        position = {layer: i for i, layer in enumerate(shape.kept_layers)}
        written: dict[str, tuple[str, TensorSpec, int | None]] = {}
        for name, (spec, layer) in self.architecture.named_tensors().items():
            if layer is None or spec.sublayer is None:
                written[name] = (name, spec, None)
            elif shape.units(spec.sublayer)[layer]:
                written[spec.name.format(position[layer])] = (name, spec, layer)
        return written

    def written(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is written, by name."""
        stored = self.source.tensors
        return {
            name: (
                self.written_shape(spec, layer),
                self.dtype or stored[self.source_name(source)].dtype,
            )
            for name, (source, spec, layer) in self.tensors().items()
        }

    def source_name(self, name: str) -> str:
        """Where a tensor is read from: a head that was tied comes from the embedding."""
        return stored_name(name, self.source, self.architecture)

    def kept(self, axis: Axis, layer: int | None) -> Tensor:
        """Indices of the kept units of an axis, `(num_kept,)`."""
        keep = self.plan.keep[axis]
        return torch.nonzero(keep if axis is Axis.HIDDEN else keep[layer]).flatten()

    def written_shape(self, spec: TensorSpec, layer: int | None) -> tuple[int, ...]:
        """Shape of a tensor after pruning."""
        return tuple(
            dim.size
            if dim.axis is None
            else dim.num_blocks * len(self.kept(dim.axis, layer)) * self._width(dim)
            for dim in spec.dims
        )

    def _width(self, dim: Dim) -> int:
        """Entries that one kept unit keeps, in each block."""
        whole = self.architecture.units_per(dim)
        return (self.plan.head_dim or whole) if dim.roles else whole

    def pruned(self, name: str, spec: TensorSpec, layer: int | None) -> Tensor:
        """One tensor, rotated, sliced and folded, in the dtype it is written in."""
        source_name = self.source_name(name)
        info = self.source.tensors[source_name]
        dtype = self.dtype or info.dtype
        if spec.dims[0].axis is not None:
            weight = self.source.read(source_name, self.device)
            if self._is_rotated:
                weight = with_norm_bias(weight, self.source, self.architecture, spec, layer)
            return self._transform(weight, spec, layer).to(dtype)
        rows = info.shape[0]
        step = max(1, CHUNK_BYTES // (4 * (info.num_bytes // info.dtype.itemsize // rows)))
        pruned = torch.empty(self.written_shape(spec, layer), dtype=dtype)
        for start in range(0, rows, step):
            part = self.source.read_rows(source_name, start, min(start + step, rows))
            pruned[start : start + step] = self._transform(part.to(self.device), spec, layer)
        return pruned

    def _transform(self, weight: Tensor, spec: TensorSpec, layer: int | None) -> Tensor:
        for index, dim in enumerate(spec.dims):  # units first: rotation then has less to do
            if dim.axis not in (None, Axis.HIDDEN):
                weight = self._select(weight, index, dim, layer)
        weight = weight.float()
        kept = self.kept(Axis.HIDDEN, None)
        if self.basis is None:
            weight = select_hidden(weight, spec, kept)
        else:
            weight = self.basis.truncated(weight, spec, layer, kept, self._norm(spec, layer))
        return self.fold(weight, spec, layer)

    def _select(self, weight: Tensor, index: int, dim: Dim, layer: int | None) -> Tensor:
        """Kept heads or FFN units of one dimension."""
        assert dim.axis is not None and layer is not None
        if dim.roles and self._width(dim) < self.architecture.units_per(dim):
            assert self.plan.basis is not None, "dimensions inside heads need a basis"
            units = self.kept(dim.axis, layer)
            return self.plan.basis.apply(weight, index, dim, layer, units, self._width(dim))
        return weight.index_select(index, self.entries(dim, layer).to(weight.device))

    def entries(self, dim: Dim, layer: int | None) -> Tensor:
        """Indices of the entries of a dimension that belong to kept units, or all."""
        if dim.axis is None:
            return torch.arange(dim.size)
        units, width = self.kept(dim.axis, layer), self.architecture.units_per(dim)
        starts = torch.arange(dim.num_blocks)[:, None] * self.architecture.num_units[dim.axis]
        return ((starts + units).flatten()[:, None] * width + torch.arange(width)).flatten()

    def _norm(self, spec: TensorSpec, layer: int | None) -> Tensor | None:
        """What the norm in front of a reader multiplies by."""
        if spec.norm is None:
            return None
        return norm_weight(self.source, self.architecture, spec.norm, layer, self.device)

    @property
    def _is_rotated(self) -> bool:
        return self.basis is not None and self.basis.is_rotated

    @property
    def _lengthened(self) -> float:
        """What norms are multiplied by to give vectors of the length that they had."""
        if self.architecture.norm is Norm.LAYER and not self._is_rotated:
            return 1.0
        return sqrt(self.architecture.num_units[Axis.HIDDEN] / self.plan.shape.hidden)

    @property
    def shrunk(self) -> float:
        """What writes to the stream are multiplied by, so that norms need no other epsilon."""
        return 1.0 if self.architecture.norm is Norm.LAYER else 1 / self._lengthened

    def fold(self, weight: Tensor, spec: TensorSpec, layer: int | None) -> Tensor:
        """What is kept of a tensor, with gates, factors and the norm's correction folded in."""
        if spec.stream in (Stream.SCALES, Stream.SHIFTS, Stream.RENEWS):
            factor = self._norm_factor(spec, layer).to(weight.device)
            return (weight + spec.offset) * factor - spec.offset + self._norm_shift(spec)
        if not spec.is_write:
            return weight
        for index, dim in enumerate(spec.dims):
            if dim.axis is None:
                continue
            if dim.axis is Axis.HIDDEN:
                factor = self._hidden_factor(spec, layer)
            else:
                factor = self._unit_factor(dim, spec, layer)
            shape = [-1 if i == index else 1 for i in range(weight.dim())]
            weight = weight * factor.view(shape).to(weight.device)
        return weight

    def _norm_factor(self, spec: TensorSpec, layer: int | None) -> Tensor:
        """What a norm's kept weights or biases are multiplied by, `(num_kept,)` or `(1,)`."""
        factor = self._scale(spec, layer, OUTPUT, self.kept(Axis.HIDDEN, None))
        if spec.stream is Stream.RENEWS:
            return factor * self.plan.gate[Axis.HIDDEN][self.kept(Axis.HIDDEN, None)]
        factor = factor * self._seen_by_head(spec)
        return factor * self._lengthened if spec.stream is Stream.SCALES else factor

    def _seen_by_head(self, spec: TensorSpec) -> Tensor | float:
        """What undoes, in the final norm, what is folded into a table that the head shares."""
        if not self.architecture.tied_head or not self.architecture.is_final_norm(spec):
            return 1.0
        return 1 / self._hidden_factor(self.architecture.embedding, None)

    def _norm_shift(self, spec: TensorSpec) -> Tensor | float:
        """What the final norm adds on top of its folded bias, `(num_kept,)`."""
        shift = self.scales.get(scale_name(spec.name.rpartition(".")[0], SHIFT))
        if shift is None or spec.stream is not Stream.SHIFTS:
            return 0.0
        return (shift[self.kept(Axis.HIDDEN, None)] * self._seen_by_head(spec)).to(self.device)

    def _hidden_factor(self, spec: TensorSpec, layer: int | None) -> Tensor:
        """What a write's kept hidden dimensions are multiplied by, `(num_kept,)` or `(1,)`."""
        kept, gate = self.kept(Axis.HIDDEN, None), self.plan.gate
        factor = self._scale(spec, layer, OUTPUT, kept)
        if spec.stream is Stream.WRITES:
            factor = factor * gate[Axis.HIDDEN][kept] * self.shrunk
        if spec.grows_with_width:
            width = self.architecture.num_units[Axis.HIDDEN]
            factor = factor * sqrt(width / self.plan.shape.hidden)
        if spec.sublayer is not None:
            factor = factor * gate["layers"][layer, spec.sublayer.order]
        return factor

    def _unit_factor(self, dim: Dim, spec: TensorSpec, layer: int | None) -> Tensor:
        """What a write's kept inputs are multiplied by, `(num_kept * width,)`."""
        assert dim.axis is not None
        units, width = self.kept(dim.axis, layer), self._width(dim)
        factor = self.plan.gate[dim.axis][layer][units].repeat_interleave(width)
        if dim.roles:  # one factor for each head, whatever is kept inside
            return factor * self._scale(spec, layer, INPUT, units).repeat_interleave(width)
        entries = (units[:, None] * width + torch.arange(width)).flatten()
        return factor * self._scale(spec, layer, INPUT, entries)

    def _scale(self, spec: TensorSpec, layer: int | None, side: str, kept: Tensor) -> Tensor:
        """Trained factors at one side of a tensor's module, ones where there are none."""
        module = spec.name.format(layer).rpartition(".")[0]
        scale = self.scales.get(scale_name(module, side))
        return torch.ones(len(kept)) if scale is None else scale[kept]


def export_weights(pruning: Pruning, folder: Path, shard_size: int) -> dict[str, str]:
    """Streams the pruned tensors into sharded safetensors.

    Args:
        pruning: what to write.
        folder: existing folder to write into.
        shard_size: largest shard, in bytes.

    Returns:
        SHA-256 of each shard by file name.
    """
    writer = ShardWriter(folder, pruning.written(), shard_size)
    for name, (source, spec, layer) in pruning.tensors().items():
        writer.write(name, pruning.pruned(source, spec, layer).contiguous())
    return writer.close()


def export_config(
    pruning: Pruning, family: Family, config: Any, is_uniform: bool
) -> dict[str, Any]:
    """The pruned model's config.json.

    Args:
        pruning: gives the shape.
        family: writes the fields.
        config: the dense model's, parsed by `transformers`.
        is_uniform: stock layout, else per-layer.

    Raises:
        UserError: the stock layout cannot express the shape.
    """
    written = shaped_config(family, config, pruning.architecture, pruning.plan.shape, is_uniform)
    numbers: Counter[torch.dtype] = Counter()
    for shape, dtype in pruning.written().values():
        numbers[dtype] += prod(shape)
    # The dense config may say otherwise: what is written counts, or most of it.
    written["dtype"] = str(numbers.most_common(1)[0][0]).removeprefix("torch.")
    return written


def export_model(
    pruning: Pruning, family: Family, config: Any, is_uniform: bool, folder: Path, shard_size: int
) -> dict[str, str]:
    """Writes a whole checkpoint: shards, config, tokenizer and, per-layer, its loader.

    Returns:
        SHA-256 of each shard by file name.
    """
    pruned_config = export_config(pruning, family, config, is_uniform)
    hashes = export_weights(pruning, folder, shard_size)
    for name in COPIED:
        if (pruning.source.folder / name).is_file():
            shutil.copyfile(pruning.source.folder / name, folder / name)
    if not is_uniform:
        loader = Path(per_layer_modeling.__file__)
        shutil.copyfile(loader, folder / loader.name)
    (folder / "config.json").write_text(json.dumps(pruned_config, indent=2, sort_keys=True) + "\n")
    return hashes
