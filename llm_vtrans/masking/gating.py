"""What gates and maps do to activations, in the model's dtype and at as little cost as may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Gate(torch.autograd.Function):
    """`x * gate` in the model's dtype, with the gate's gradient summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        low = gate.to(x.dtype)
        ctx.save_for_backward(x, low)
        return x * low

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, low = ctx.saved_tensors
        product = grad * x
        grad_gate = product.flatten(0, -2).sum(0, dtype=torch.float32)
        return torch.mul(grad, low, out=product), grad_gate  # memory that is at hand


def apply_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiplies activations by a gate.

    Args:
        x: `(..., width)` in the model's dtype.
        gate: `(width,)` float32.
    """
    gated: Tensor = _Gate.apply(x, gate)
    return gated


def map_read(stream: Tensor, matrix: Tensor, kept: Tensor | None) -> Tensor:
    """Maps what is read from the stream; dimensions that went are zero in it and cost nothing.

    Args:
        stream: `(..., width)` in the model's dtype.
        matrix: `(width, num_kept)` in that dtype.
        kept: `(num_kept,)` indices; None for all.
    """
    if kept is not None:
        stream = stream.index_select(-1, kept)
    return nn.functional.linear(stream, matrix.to(stream.dtype))


def map_written(output: Tensor, matrix: Tensor, kept: Tensor | None) -> Tensor:
    """Maps what is written to the stream by `(num_kept, width)`; zeros where dimensions went."""
    mapped = nn.functional.linear(output, matrix.to(output.dtype))
    if kept is None:
        return mapped
    return mapped.new_zeros(output.shape).index_copy_(-1, kept, mapped)


def weighted_layer_norm(
    x: Tensor, norm: nn.LayerNorm, present: Tensor, width: int | None = None
) -> Tensor:
    """LayerNorm over the dimensions that are present, and zero in the others.

    Args:
        x: `(..., width)`.
        norm: the dense layer, whose weight, bias and epsilon are used.
        present: `(width,)` float32 in [0, 1]; ones give the dense function, zeros and ones
            that of a smaller layer.
        width: of the dense layer, of which the output keeps the length; None if each dimension
            keeps its size.
    """
    values = x.float()
    total = present.sum()
    centred = values - (values * present).sum(-1, keepdim=True) / total
    variance = (centred.square() * present).sum(-1, keepdim=True) / total
    normal = centred * torch.rsqrt(variance + norm.eps)
    if width is not None:
        normal = normal * (width / total).sqrt()
    return ((normal * norm.weight.float() + norm.bias.float()) * present).to(x.dtype)


def map_heads(x: Tensor, maps: Tensor) -> Tensor:
    """Applies one map per head, `(H, D, D)`, to activations `(..., H * D)`."""
    heads = x.unflatten(-1, maps.shape[:2])
    return torch.einsum("...hd,hed->...he", heads, maps.to(x.dtype)).flatten(-2)
