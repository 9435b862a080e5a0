"""What the library writes as chains of element-wise operations, in one kernel each.

On a device that is fast at matrix products each of those operations waits for memory. Norms
compute by torch's kernel; rotary embeddings and gated FFNs by those of Liger (arXiv:2410.10989),
where it is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llm_vtrans.families.base import Stream, TensorSpec

NamedTensors = Mapping[str, tuple[TensorSpec, int | None]]
LIGER = "liger_kernel"
# As the library calls them, whatever the family: the function that turns queries and keys, and
# all that a gated FFN's forward pass names.
ROTARY = "apply_rotary_pos_emb"
GATED_FFN = {"gate_proj", "up_proj", "act_fn", "down_proj"}
SILU = ("SiLU", "SiLUActivation")


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


def fuse(model: nn.Module, tensors: NamedTensors) -> None:
    """Lets chains of operations compute in one kernel each, on a GPU.

    Args:
        model: of the library, on its device; modules of it change class in place.
        tensors: its tensors by name, each with its row of the table and its layer.
    """
    if next(model.parameters()).device.type != "cuda":
        return
    replace_norms(model, tensors)
    if find_spec(LIGER) is not None:
        logging.getLogger(LIGER).setLevel(logging.ERROR)  # it tells of each backend that is absent
        from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb

        replace_rotary(model, liger_rotary_pos_emb)
        replace_gated_ffn(model, LigerSwiGLUMLP.forward)


def replace_norms(model: nn.Module, tensors: NamedTensors) -> None:
    """Replaces the norms of the residual stream.

    Weights to which something is added stay: their sum would be rounded to the model's dtype.
    """
    norms = (
        model.get_submodule(name.rpartition(".")[0])
        for name, (spec, _) in tensors.items()
        if spec.stream is Stream.SCALES and not spec.offset
    )
    # torch has a kernel for LayerNorms anyway
    stock = (norm for norm in norms if not isinstance(norm, FusedNorm | nn.LayerNorm))
    _change(stock, lambda kind: _subclass(kind, FusedNorm))


def replace_rotary(model: nn.Module, turn: Callable[..., Any]) -> None:
    """Replaces the rotary embedding in the forward passes of this model, and of no other.

    Args:
        model: of the library.
        turn: what to compute it by, called as the library's function.
    """

    def turns(module: nn.Module) -> bool:
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
            return False
        known = forward.__globals__.get(ROTARY)
        return ROTARY in forward.__code__.co_names and known is not turn

    _change(
        filter(turns, model.modules()),
        lambda kind: _subclass(kind, forward=_with(kind.forward, {ROTARY: turn})),
    )


def replace_gated_ffn(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Replaces the forward pass of FFNs that are gated by SiLU and do nothing else.

    Args:
        model: of the library.
        forward: takes module and input.
    """

    def is_gated(module: nn.Module) -> bool:
        names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        return {*names} == GATED_FFN and type(module.act_fn).__name__ in SILU

    _change(filter(is_gated, model.modules()), lambda kind: _subclass(kind, forward=forward))


def _change(modules: Iterable[nn.Module], fused: Callable[[Any], type[nn.Module]]) -> None:
    """Gives modules other classes: those of one class share one that is made of it."""
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for module in modules:
        kind = type(module)
        if kind not in made:
            made[kind] = fused(kind)
        module.__class__ = made[kind]


def _subclass(kind: type[nn.Module], *mixins: type, **members: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (*mixins, kind), members)


def _with(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """The same function, to which some names of its module mean something else."""
    changed = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed
