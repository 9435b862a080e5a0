"""Second moments of activations, as fast as they are exact."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # products of these are exact in TF32, which is far faster


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
