"""Puts masks on a frozen model: where they multiply is read off the family's tensor table.

Every weight that writes to the residual stream marks two places. Its module's input
is gated by the unit mask of its other dimension (heads at `o_proj`, FFN units at
`down_proj`), its output by the hidden mask times the sub-layer's scalar. So the
stream is always `z_hidden * (sum of writes)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.families.base import Architecture, Axis, Stream, Sublayer


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
        grad_gate = (grad * x).flatten(0, -2).sum(0, dtype=torch.float32)
        return grad * low, grad_gate


def apply_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Multiplies activations by a gate.

    Args:
        x: `(..., width)` in the model's dtype.
        gate: `(width,)` float32.
    """
    gated: Tensor = _Gate.apply(x, gate)
    return gated


class MaskedModel(nn.Module):
    """A frozen model whose activations are gated by the values in `gates`, where set.

    Args:
        model: the library's model; its parameters are frozen here.
        architecture: its tensor table.
    """

    def __init__(self, model: nn.Module, architecture: Architecture):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.architecture = architecture
        self._gates: Mapping[str, Tensor] | None = None
        for name, (spec, layer) in architecture.named_tensors().items():
            if spec.stream is Stream.WRITES and len(spec.dims) == 2:
                self._hook(name.removesuffix(".weight"), spec.dims, spec.sublayer, layer)

    def set_gates(self, gates: Mapping[str, Tensor] | None) -> None:
        """Sets the gate values of the coming forward passes; None takes the masks off.

        Args:
            gates: `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`, `layers (L, 2)`; a structure
                that is missing is not gated. They stay in force until the next call, so that
                recomputation under activation checkpointing sees the same draw.
        """
        self._gates = gates

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `(batch, seq, vocab)` for tokens `(batch, seq)`."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """What the output head reads, `(batch, seq, hidden)`, for tokens `(batch, seq)`."""
        base: Any = self.model.base_model
        hidden: Tensor = base(input_ids=input_ids, use_cache=False)[0]
        return hidden

    @property
    def head(self) -> nn.Module:
        """The output head, from hidden states to logits."""
        model: Any = self.model
        head: nn.Module = model.get_output_embeddings()
        return head

    def _hook(self, path: str, dims: Any, sublayer: Sublayer | None, layer: int | None) -> None:
        module = self.model.get_submodule(path)
        unit_dim = next((d for d in dims if d.axis not in (Axis.HIDDEN, None)), None)
        if unit_dim is not None:
            width = self.architecture.units_per(unit_dim)
            module.register_forward_pre_hook(self._gate_input(unit_dim.axis, layer, width))
        module.register_forward_hook(self._gate_output(sublayer, layer))

    def _gate_input(self, axis: Axis, layer: int | None, width: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._gates is None or axis not in self._gates:
                return None
            gate = self._gates[axis][layer]
            return (apply_gate(args[0], gate.repeat_interleave(width)), *args[1:])

        return hook

    def _gate_output(self, sublayer: Sublayer | None, layer: int | None) -> Callable[..., Any]:
        part = None if sublayer is None else list(Sublayer).index(sublayer)

        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
            gates = self._gates
            if gates is None:
                return None
            gate = gates.get(Axis.HIDDEN)
            if part is not None and "layers" in gates:
                scalar = gates["layers"][layer, part]
                width = output.shape[-1]
                gate = scalar.expand(width) if gate is None else gate * scalar
            return None if gate is None else apply_gate(output, gate)

        return hook
