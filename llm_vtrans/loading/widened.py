"""Half-precision products on processors that have none: in float32, one weight at a time.

Where oneDNN lacks a type, torch falls back to a loop for `gradient @ weight`, measured at a
fiftieth of the float32 product's speed. The frozen weights stay as they are; a float32 copy of
one lives as long as its product takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IS_SUPPORTED = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` of frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not a saved tensor: under ZeRO-3 it is empty between its uses
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad.float() @ ctx.weight.float()).to(grad.dtype), None, None


class WidenedLinear(nn.Linear):
    """A frozen linear layer in half precision that computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        product: Tensor = _Product.apply(x, self.weight, self.bias)
        return product


def widen_where_slow(model: nn.Module, device: torch.device) -> None:
    """Turns frozen linear layers in half precision into `WidenedLinear` where that is faster.

    Args:
        model: its layers change class in place; quantised ones and those that train do not.
        device: that computes.
    """
    if device.type != "cpu":
        return
    slow = {dtype for dtype, is_supported in IS_SUPPORTED.items() if not is_supported()}
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.requires_grad:
            continue
        if module.weight.dtype in slow:
            module.__class__ = WidenedLinear
