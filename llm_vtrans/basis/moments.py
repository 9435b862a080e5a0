"""Second moments of activations, as fast as they are exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # products of these are exact in TF32, which is far faster


def token_rows(batch: Any) -> Tensor | None:
    """Which rows of a batch's hidden states are no padding, `(tokens,)` bool; None if all are.

    Args:
        batch: what the model's `forward` takes by name, or tokens alone.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    rows: Tensor = mask.flatten() > 0
    return None if rows.all() else rows


def tokens_of(stream: Tensor, rows: Tensor | None) -> Tensor:
    """What is no padding.

    Args:
        stream: `(..., width)`.
        rows: of `token_rows`.

    Returns:
        `(tokens, width)`.
    """
    flat = stream.flatten(0, -2)
    return flat if rows is None else flat[rows]


def add_moment(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds `x^T y`, summed in float32.

    Args:
        total: `(width, other_width)` float32.
        x: `(tokens, width)` of any float dtype.
        y: `(tokens, other_width)` of that dtype.
    """
    before = torch.get_float32_matmul_precision()
    if x.is_cuda and x.dtype in HALF and y.dtype in HALF:
        torch.set_float32_matmul_precision("high")
    try:
        total.addmm_(x.T.float(), y.float())
    finally:
        torch.set_float32_matmul_precision(before)
