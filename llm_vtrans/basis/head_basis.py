"""Dimensions inside heads, re-based so that the first ones carry most of what a head does.

Without rotary positions a head is unchanged by an invertible map on its queries with
the inverse transpose on its keys, and likewise on values and output weights. With the
second moments `M = L L^T` of the two partners, the singular values of `L_a^T L_b` are
what each pair of new dimensions contributes to the attention scores, or to the
stream, on calibration data: the balanced basis orders them, and truncating it is the
approximation of least expected squared error (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.basis.moments import token_rows, tokens_of
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import gathered
from llm_vtrans.families.base import Architecture, Axis, Dim, Role
from llm_vtrans.masking.hooks import removed_after

FLOOR = 1e-9  # of the largest eigenvalue: keeps a moment of few tokens invertible
PREFIX = "head_basis."  # of the maps in masks.safetensors
PARTNERS = ((Role.QUERY, Role.KEY), (Role.VALUE, Role.OUTPUT))


@dataclass(frozen=True)
class HeadBasis:
    """A change of basis inside every head.

    Attributes:
        maps: `(L, H, D, D)` float32 for each role; row i gives the new dimension i, strongest
            first. Applied to all roles at full width they leave the function as it is.
        retained: `(D,)` float64, share of the squared contributions that the first i + 1
            dimensions keep, mean over heads and layers.
    """

    maps: Mapping[Role, Tensor]
    retained: Tensor

    @classmethod
    def saved(cls, tensors: Mapping[str, Tensor]) -> HeadBasis | None:
        """The basis among the tensors of `masks.safetensors`, or None if all dimensions stay."""
        maps = {role: tensors[f"{PREFIX}{role}"] for role in Role if f"{PREFIX}{role}" in tensors}
        return cls(maps, torch.empty(0)) if maps else None

    @property
    def width(self) -> int:
        """New dimensions of which the maps are known."""
        return int(self.maps[Role.QUERY].shape[2])

    def projectors(self, head_dim: int) -> dict[Role, Tensor]:
        """What queries and mixed values become if only `head_dim` dimensions stay.

        Returns:
            `(L, H, D, D)` for `QUERY` and for `OUTPUT` (its input): maps to the old basis.
        """
        kept = {role: maps[:, :, :head_dim] for role, maps in self.maps.items()}
        return {
            name: torch.einsum("lhrd,lhre->lhde", kept[second], kept[first])
            for name, (first, second) in zip((Role.QUERY, Role.OUTPUT), PARTNERS, strict=True)
        }

    def apply(
        self, weight: Tensor, index: int, dim: Dim, layer: int, heads: Tensor, head_dim: int
    ) -> Tensor:
        """One tensor with its head dimension in the new basis, cut to kept heads.

        The queries take up what the attention scale `1 / sqrt(head_dim)` changes by.

        Args:
            weight: of the dense model.
            index: of its head dimension.
            dim: that dimension's label.
            layer: original index.
            heads: kept heads, `(num_kept,)`.
            head_dim: kept dimensions of a head.
        """
        width = self.maps[Role.QUERY].shape[-1]
        blocks = weight.float().movedim(index, -1).unflatten(-1, (dim.num_blocks, -1, width))
        parts = []
        for block, role in enumerate(dim.roles):
            maps = self.maps[role][layer, heads, :head_dim].to(weight.device)
            scale = sqrt(head_dim / width) if role is Role.QUERY else 1.0
            parts.append(
                torch.einsum(
                    "...hd,hed->...he", blocks[..., block, heads.to(weight.device), :], maps * scale
                )
            )
        return torch.stack(parts, dim=-3).flatten(-3).movedim(-1, index)


@torch.no_grad()
def balanced_basis(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[Any],
    forward: Callable[[Any], object],
) -> HeadBasis:
    """The basis from calibration data.

    Args:
        model: the dense model.
        architecture: its table, in which head dimensions carry roles.
        batches: calibration inputs on the model's device.
        forward: runs the model on one batch.
    """
    num_layers, num_heads = architecture.num_layers, architecture.num_units[Axis.HEADS]
    width = architecture.head_dim
    assert width is not None
    device = next(model.parameters()).device
    moments = {
        role: torch.zeros(num_layers, num_heads, width, width, device=device) for role in Role
    }

    rows: Tensor | None = None

    def add(moment: Tensor, x: Tensor) -> None:
        heads = x.detach().float().unflatten(-1, (num_heads, width))
        moment += torch.einsum("nhd,nhe->hde", heads, heads)

    def observe(moment: Tensor, x: Tensor) -> None:
        add(moment, tokens_of(x, rows))

    hooks = []
    for name, (spec, layer) in architecture.named_tensors().items():
        path, _, leaf = name.rpartition(".")
        dim = next((dim for dim in spec.dims if dim.roles), None)
        if leaf != "weight" or dim is None or layer is None:
            continue
        module = model.get_submodule(path)
        if dim.roles == (Role.OUTPUT,):
            weight = module.get_parameter(leaf)
            with gathered([weight]):
                add(moments[Role.OUTPUT][layer], weight.movedim(spec.dims.index(dim), -1))
            mixed = moments[Role.VALUE][layer]
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, m=mixed: observe(m, args[0]))
            )
            continue

        def split(
            _: nn.Module, __: object, output: Tensor, dim: Dim = dim, at: int = layer
        ) -> None:
            for role, x in zip(dim.roles, output.chunk(dim.num_blocks, dim=-1), strict=True):
                if role in (Role.QUERY, Role.KEY):
                    observe(moments[role][at], x)

        hooks.append(module.register_forward_hook(split))
    with removed_after(hooks):
        for batch in batches:
            rows = token_rows(batch)
            forward(batch)
    return agreed(_balance(moments))


def _balance(moments: Mapping[Role, Tensor]) -> HeadBasis:
    maps, shares = {}, []
    for first, second in PARTNERS:
        left, right = _root(moments[first]), _root(moments[second])
        u, values, vh = torch.linalg.svd(left.mT @ right)
        inverse = values.clamp(min=1e-30).rsqrt()[..., None]
        maps[first] = (inverse * (vh @ right.mT)).float()
        maps[second] = (inverse * (u.mT @ left.mT)).float()
        energy = values.square().cumsum(-1)
        shares.append(energy / energy[..., -1:].clamp(min=1e-30))
    return HeadBasis(maps, torch.stack(shares).flatten(0, 2).mean(0))


def _root(moment: Tensor) -> Tensor:
    """`L` with `L L^T = moment`, `(L, H, D, D)` float64 on the CPU."""
    values, vectors = torch.linalg.eigh(moment.double().cpu())
    floor = FLOOR * values[..., -1:].clamp(min=1e-30)
    return vectors * values.clamp(min=floor).sqrt()[..., None, :]
