"""RMSNorms in one kernel: the library writes them as a chain of element-wise operations.

On a device that is fast at matrix products each of those waits for memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from llm_vtrans.families.base import Stream, TensorSpec

NamedTensors = Mapping[str, tuple[TensorSpec, int | None]]


class FusedNorm(nn.Module):
    """What makes an RMSNorm of the library's compute in one kernel, mixed into its class."""

    variance_epsilon: float
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the library's."""
        if self.weight.dtype is not hidden_states.dtype:  # under autocast: there is no kernel
            stock: Tensor = super().forward(hidden_states)
            return stock
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module, tensors: NamedTensors) -> None:
    """Lets the norms of the residual stream compute in one kernel each, where there is one.

    Args:
        model: of the library, on its device; its norms change class in place.
        tensors: its tensors by name, each with its row of the table and its layer.
    """
    if next(model.parameters()).device.type == "cuda":
        replace_norms(model, tensors)


def replace_norms(model: nn.Module, tensors: NamedTensors) -> None:
    """As `fuse_norms`, on any device.

    Weights to which something is added stay: their sum would be rounded to the model's dtype.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for name, (spec, _) in tensors.items():
        if spec.stream is not Stream.SCALES or spec.offset:
            continue
        norm = model.get_submodule(name.rpartition(".")[0])
        kind = type(norm)
        if issubclass(kind, (FusedNorm, nn.LayerNorm)):  # torch has a kernel for these anyway
            continue
        if kind not in kinds:
            kinds[kind] = type(f"Fused{kind.__name__}", (FusedNorm, kind), {})
        norm.__class__ = kinds[kind]
