"""EXPORT: plan + original shards -> smaller shards, one tensor at a time.

The exported dense network computes the same function as the hard-masked one:

- gates are folded once, into the tensors that write to the residual stream;
- a norm over `d'` of `d` dimensions sees `d / d'` times the mean square, so what writes
  to the stream is scaled by `sqrt(d' / d)` and norm weights by its inverse. The norm's
  epsilon then stays as it is (METHOD: scaling epsilon instead would also reach the
  per-head norms of families that share it);
- a tied head reads through the folded embedding, which the final norm's weight undoes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_vtrans import per_layer_modeling
from llm_vtrans.allocation import PrunePlan
from llm_vtrans.checkpoint import Checkpoint
from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Family,
    Stream,
    Sublayer,
    TensorSpec,
)
from llm_vtrans.loading import stored_name
from llm_vtrans.rotation import rotate_tensor
from llm_vtrans.shard_writer import ShardWriter

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
        basis: rotation `(hidden_size, hidden_size)` float32, or None.
        dtype: of the written tensors; None keeps each tensor's own.
    """

    source: Checkpoint
    architecture: Architecture
    plan: PrunePlan
    basis: Tensor | None = None
    dtype: torch.dtype | None = None

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
            else len(self.kept(dim.axis, layer)) * self.architecture.units_per(dim)
            for dim in spec.dims
        )

    def pruned(self, name: str, spec: TensorSpec, layer: int | None) -> Tensor:
        """One tensor, rotated, sliced and folded, in the dtype it is written in."""
        source_name = self.source_name(name)
        info = self.source.tensors[source_name]
        dtype = self.dtype or info.dtype
        if spec.dims[0].axis is not None:
            return self._transform(self.source.read(source_name), spec, layer).to(dtype)
        rows = info.shape[0]
        step = max(1, CHUNK_BYTES // (4 * (info.num_bytes // info.dtype.itemsize // rows)))
        pruned = torch.empty(self.written_shape(spec, layer), dtype=dtype)
        for start in range(0, rows, step):
            part = self.source.read_rows(source_name, start, min(start + step, rows))
            pruned[start : start + step] = self._transform(part, spec, layer)
        return pruned

    def _transform(self, weight: Tensor, spec: TensorSpec, layer: int | None) -> Tensor:
        for index, dim in enumerate(spec.dims):  # units first: rotation then has less to do
            if dim.axis not in (None, Axis.HIDDEN):
                weight = weight.index_select(index, self._entries(dim.axis, dim, layer))
        hidden = spec.dim_of(Axis.HIDDEN)
        weight = weight.float()
        if hidden is not None:
            kept = self.kept(Axis.HIDDEN, None)
            if self.basis is not None:
                norm = self.source.read(spec.norm.format(layer)) if spec.norm else None
                weight = rotate_tensor(weight, spec, self.basis[:, kept], norm)
            else:
                weight = weight.index_select(hidden, kept)
        return self._fold(weight, spec, layer)

    def _entries(self, axis: Axis, dim: Any, layer: int | None) -> Tensor:
        width = self.architecture.units_per(dim)
        return (self.kept(axis, layer)[:, None] * width + torch.arange(width)).flatten()

    def _fold(self, weight: Tensor, spec: TensorSpec, layer: int | None) -> Tensor:
        kept, gate = self.kept(Axis.HIDDEN, None), self.plan.gate
        scale = sqrt(len(kept) / self.architecture.num_units[Axis.HIDDEN])
        if spec.stream is Stream.SCALES:
            is_shared = spec.name == self.architecture.final_norm and self.architecture.tied_head
            undo = scale * gate[Axis.HIDDEN][kept] if is_shared else torch.ones(())
            return weight / (scale * undo)
        if spec.stream is not Stream.WRITES:
            return weight
        for index, dim in enumerate(spec.dims):
            if dim.axis is None:
                continue
            factor = gate[dim.axis] if dim.axis is Axis.HIDDEN else gate[dim.axis][layer]
            factor = factor[self.kept(dim.axis, layer)].repeat_interleave(
                self.architecture.units_per(dim)
            )
            if dim.axis is Axis.HIDDEN:
                factor = factor * scale
                if spec.sublayer is not None:
                    factor = factor * gate["layers"][layer, list(Sublayer).index(spec.sublayer)]
            weight = weight * factor.view([-1 if i == index else 1 for i in range(weight.dim())])
        return weight


def export_weights(pruning: Pruning, folder: Path, shard_size: int) -> dict[str, str]:
    """Streams the pruned tensors into sharded safetensors.

    Args:
        pruning: what to write.
        folder: existing folder to write into.
        shard_size: largest shard, in bytes.

    Returns:
        SHA-256 of each shard by file name.
    """
    tensors = pruning.tensors()
    specs = {
        name: (
            pruning.written_shape(spec, layer),
            pruning.dtype or pruning.source.tensors[pruning.source_name(source)].dtype,
        )
        for name, (source, spec, layer) in tensors.items()
    }
    writer = ShardWriter(folder, specs, shard_size)
    for name, (source, spec, layer) in tensors.items():
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
    dense = config.to_dict()
    dense.pop("_name_or_path", None)
    dense["tie_word_embeddings"] = pruning.architecture.tied_head is not None
    if pruning.dtype is not None:
        dense["dtype"] = str(pruning.dtype).removeprefix("torch.")
    write = family.stock_config if is_uniform else family.per_layer_config
    return write(dense, pruning.plan.shape)


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


def plan_tensors(plan: PrunePlan, basis: Tensor | None) -> Mapping[str, Tensor]:
    """What `masks.safetensors` keeps of a plan beside the masks themselves."""
    tensors = {f"keep.{name}": keep.to(torch.uint8) for name, keep in plan.keep.items()}
    return tensors if basis is None else {**tensors, "rotation": basis}
