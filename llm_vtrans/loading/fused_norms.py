"""RMSNorms in one kernel: the library writes them as a chain of element-wise operations.

On a device that is fast at matrix products each of those waits for memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llm_vtrans.families.base import Architecture, Norm, Stream


def fuse_norms(model: nn.Module, architecture: Architecture) -> None:
    """Lets the norms of the residual stream compute in one kernel each, where it has one.

    Args:
        model: of the library, on its device; its norms change class in place.
        architecture: its table.
    """
    if next(model.parameters()).device.type == "cuda":
        replace_norms(model, architecture)


def replace_norms(model: nn.Module, architecture: Architecture) -> None:
    """As `fuse_norms`, on any device.

    Weights to which something is added stay: their sum would be rounded to the model's dtype.
    """
    if architecture.norm is not Norm.RMS:
        return
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for name, (spec, _) in architecture.named_tensors().items():
        if spec.stream is Stream.SCALES and not spec.offset:
            norm = model.get_submodule(name.rpartition(".")[0])
            kind = type(norm)
            if kind not in kinds:
                kinds[kind] = type(f"Fused{kind.__name__}", (FusedNorm, kind), {})
            norm.__class__ = kinds[kind]


class FusedNorm(nn.Module):
    """An RMSNorm of the library's that computes in one kernel, mixed into its class."""

    variance_epsilon: float
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the library's, whatever its parameter is called."""
        if self.weight.dtype is not hidden_states.dtype:  # under autocast: there is no kernel
            stock: Tensor = super().forward(hidden_states)
            return stock
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
