"""Puts masks on a frozen model: where they multiply is read off the family's tensor table.

Every weight that writes to the residual stream marks two places. Its module's input
is gated by the unit mask of its other dimension (heads at `o_proj`, FFN units at
`down_proj`), its output by the hidden mask times the sub-layer's scalar. So the
stream is always `z_hidden * (sum of writes)`. Where a post-norm follows, the hidden
mask gates that norm's output instead: it is the stream.

LayerNorm subtracts a mean, so zeros would not stay zero: it runs over the dimensions
that are present (METHOD, section 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Dim,
    Norm,
    Role,
    Stream,
    TensorSpec,
    head_of,
)
from llm_vtrans.masking.by_layer import (
    KEPT_HIDDEN,
    PRESENT_HIDDEN,
    PRESENT_LAYERS,
    PROJECTORS,
    WRITTEN,
    Alive,
    Gates,
    by_layer,
)
from llm_vtrans.masking.fused import NamedTensors, fuse
from llm_vtrans.masking.gating import (
    apply_gate,
    map_heads,
    map_read,
    map_written,
    weighted_layer_norm,
)
from llm_vtrans.masking.tuning import INPUT, OUTPUT, Tuning
from llm_vtrans.masking.unpacked import unpacked

LINEAR_HEADS = ("ForCausalLM", "LMHeadModel")  # endings of classes whose head is one matrix
TOKEN_HEADS = (*LINEAR_HEADS, "ForMaskedLM")
RESCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what follows it, if set


class MaskedModel(nn.Module):
    """A frozen model whose activations are gated by the values in `gates`, where set.

    Args:
        model: the library's model; its parameters are frozen here.
        architecture: its tensor table.
        tuning: acts where gates are set and it is on; None leaves the gates alone.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, tuning: Tuning | None = None):
        super().__init__()
        self.architecture, self._is_post_norm = architecture, architecture.is_post_norm
        # Not one of this module's own: ZeRO-3 would slice it with the weights.
        self._tuning = [tuning or Tuning(architecture, is_rotated=False, is_empty=True)]
        self._whole: list[Any] = [model]
        self._gates: dict[str, Any] | None = None
        self._maps: dict[str, Tensor] = {}  # of the present pass
        self._added: dict[tuple[int | None, int], Tensor] = {}  # to the stream, by sub-layer
        self.attach(model.requires_grad_(False), architecture.named_tensors())

    def attach(self, model: nn.Module, tensors: NamedTensors, alive: Gates | None = None) -> None:
        """Hooks gates onto a network and makes it the one that is run.

        Args:
            model: the whole one, or one from which units are gone already.
            tensors: name in it -> row and original layer.
            alive: booleans as gates are shaped, which of their units it has; None for all.
        """
        fuse(model, tensors)
        self.run(model, None if alive is None else Alive(alive))
        # In front of all layers: what they share must not be part of one that is recomputed.
        self.model.base_model.register_forward_pre_hook(self._prepare_maps)
        for name, (spec, layer) in tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight":
                self._hook(path, spec, layer)
        tied = self.architecture.tied_head
        if tied is not None and self._is_post_norm:
            module = model.get_submodule(tied.rpartition(".")[0])
            module.register_forward_pre_hook(self._map_input(self.architecture.embedding, None))

    def run(self, model: nn.Module, alive: Alive | None = None) -> None:
        """Makes a network that gates were hooked onto the one that is run."""
        self.model: Any = model
        self._alive = alive

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Runs the whole network meanwhile, without gates; none are in force afterwards."""
        present = self.model, self._alive
        self.set_gates(None)
        self.run(self._whole[0])
        try:
            yield
        finally:
            self.run(*present)

    @property
    def tuning(self) -> Tuning:
        """The maps and factors; the stage that trains them is the module that owns them."""
        return self._tuning[0]

    def set_gates(self, gates: Gates | None) -> None:
        """Sets the gate values of the coming forward passes; None takes masks and tuning off.

        Args:
            gates: `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`, `layers (L, 2)`, and what
                `presence` or `PrunePlan.hard` add; a structure that is missing is not gated.
                They stay in force until the next call, so that recomputation under
                activation checkpointing sees the same draw.
        """
        self._gates = None if gates is None else by_layer(gates, self._alive)

    def whole_stream(self, hidden: Tensor) -> Tensor:
        """The residual stream `(..., present)` at full width, zeros where dimensions are gone."""
        if self._alive is None:
            return hidden
        width, alive = self.architecture.num_units[Axis.HIDDEN], self._alive.hidden
        if self.architecture.norm is Norm.RMS:  # it was scaled for the norm's mean, see export
            hidden = hidden * math.sqrt(width / len(alive))
        whole = hidden.new_zeros(*hidden.shape[:-1], width)
        whole[..., alive] = hidden
        return whole

    def forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Logits for tokens `(batch, seq)` or for all that the model's `forward` takes by name."""
        return logits_of(self.outputs(inputs))

    def outputs(self, inputs: Tensor | Mapping[str, Tensor], **asked: bool) -> Any:
        """All that the model's `forward` gives, called with what is asked for by name."""
        with unpacked():
            return self.model(**_named(inputs), use_cache=False, **asked)

    def hidden_states(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """What the output head of a language model reads, `(batch, seq, hidden)`."""
        with unpacked():
            hidden: Tensor = self.model.base_model(**_named(inputs), use_cache=False)[0]
        return hidden

    @property
    def predicts_tokens(self) -> bool:
        """Whether it is a language model, which answers at every token."""
        return head_of(self.model.config) in TOKEN_HEADS

    @property
    def head(self) -> nn.Module | None:
        """The linear map from `hidden_states` to logits; None where a model does more than that."""
        config = self.model.config
        if head_of(config) not in LINEAR_HEADS or any(getattr(config, n, None) for n in RESCALES):
            return None
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def _hook(self, path: str, spec: TensorSpec, layer: int | None) -> None:
        """Registers what one weight's row of the table asks for."""
        module = self.model.get_submodule(path)
        name = spec.name.format(layer).rpartition(".")[0]  # of the module in the whole network
        if spec.stream in (Stream.SCALES, Stream.RENEWS):
            if self.architecture.norm is Norm.LAYER:
                module.register_forward_hook(self._normalise(name, spec, layer))
            else:
                module.register_forward_hook(self._tune_norm(name, spec, layer))
            return
        if spec.stream is Stream.TAKES:
            module.register_forward_pre_hook(self._keep_present)
        if spec.stream is Stream.READS and self._is_post_norm:
            module.register_forward_pre_hook(self._map_input(spec, layer))
        for dim in spec.dims:
            for block, role in enumerate(dim.roles):
                if role is Role.QUERY:
                    module.register_forward_hook(self._project_output(dim, block, layer))
                elif role is Role.OUTPUT:
                    module.register_forward_pre_hook(self._project_input(layer))
        if spec.is_write:
            for dim in spec.dims:
                if dim.axis not in (Axis.HIDDEN, None):
                    module.register_forward_pre_hook(self._gate_input(name, dim, layer))
            module.register_forward_hook(self._gate_output(name, spec, layer))

    def _unit_scale(self, path: str, dim: Dim, layer: int | None) -> Tensor | None:
        """Factors of the units that the network has, one for each of a module's inputs."""
        scale = self.tuning.scale(path, INPUT)
        if scale is None:
            return None
        width = self.architecture.units_per(dim)
        if len(scale) < dim.size:
            scale = scale.repeat_interleave(width)
        if self._alive is None or dim.axis is None or layer is None:
            return scale
        kept = self._alive.units[dim.axis][layer]
        return scale.view(-1, width).index_select(0, kept).flatten()

    def _gate_input(self, path: str, dim: Dim, layer: int | None) -> Callable[..., Any]:
        width = self.architecture.units_per(dim)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._gates is None:
                return None
            scale = self._unit_scale(path, dim, layer)
            gate = None
            if dim.axis is not None and dim.axis in self._gates:
                gate = self._gates[dim.axis][layer]
                gate = gate if width == 1 else gate.repeat_interleave(width)
            factor = _product(gate, scale)
            return None if factor is None else (apply_gate(args[0], factor), *args[1:])

        return hook

    def _prepare_maps(self, *_: Any) -> None:
        gates = self._gates or {}
        has_gates = self._gates is not None
        self._maps = self.tuning.prepared(gates.get(KEPT_HIDDEN), self.model.dtype, has_gates)

    def _map(self, spec: TensorSpec, layer: int | None) -> Tensor | None:
        return self._maps.get(self.tuning.map_name(spec, layer))

    def _tune_norm(self, path: str, spec: TensorSpec, layer: int | None) -> Callable[..., Any]:
        """Factors of an RMSNorm, and the map in front of what reads the stream."""

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            scale = None if self._gates is None else self.tuning.scale(path, OUTPUT)
            return self._read(output, spec, layer, scale)

        return hook

    def _map_input(self, spec: TensorSpec, layer: int | None) -> Callable[..., Any]:
        """The map of what reads, or of the embeddings' table where a head takes its input by it."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._gates is None or (matrix := self._map(spec, layer)) is None:
                return None
            matrix = matrix.T if spec.is_write else matrix
            return (map_read(args[0], matrix, self._gates.get(KEPT_HIDDEN)), *args[1:])

        return hook

    def _gate_output(self, path: str, spec: TensorSpec, layer: int | None) -> Callable[..., Any]:
        part = None if spec.sublayer is None else spec.sublayer.order

        def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
            gates = self._gates
            if gates is None:
                return None
            is_stream = spec.stream is Stream.WRITES
            if part is None or "layers" not in gates:
                gate = gates.get(Axis.HIDDEN) if is_stream else None
            elif is_stream and WRITTEN in gates:
                gate = gates[WRITTEN][layer][part]
            else:
                gate = gates["layers"][layer][part].expand(output.shape[-1])
            factor = _product(gate, self.tuning.scale(path, OUTPUT))
            matrix, kept = self._map(spec, layer), gates.get(KEPT_HIDDEN)
            if matrix is not None:
                if factor is not None:
                    matrix = apply_gate(matrix.T, _select(factor, kept)).T
                output = map_written(output, matrix, kept)
            elif factor is not None:
                output = apply_gate(output, factor)
            if spec.stream is Stream.JOINS and part is not None and PRESENT_LAYERS in gates:
                self._added[layer, part] = output
            return output

        return hook

    def _normalise(self, path: str, spec: TensorSpec, layer: int | None) -> Callable[..., Any]:
        """LayerNorm over present dimensions; a post-norm is gated and goes with its sub-layer."""
        part = None if spec.sublayer is None else spec.sublayer.order

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            gates, is_stream = self._gates, spec.stream is Stream.RENEWS
            if gates is None:
                return None if is_stream else self._read(output, spec, layer)
            output = self.layer_norm(module, args[0], output)
            gate = gates.get(Axis.HIDDEN) if is_stream else None
            factor = _product(gate, self.tuning.scale(path, OUTPUT))
            output = output if factor is None else apply_gate(output, factor)
            if not is_stream:
                return self._read(output, spec, layer)
            if part is not None and PRESENT_LAYERS in gates:
                # Without the norm the noise of an absent sub-layer would stay in the stream.
                before = args[0] - self._added.pop((layer, part))
                present = gates[PRESENT_LAYERS][layer][part].to(output.dtype)
                output = torch.lerp(before, output, present)
            return output

        return hook

    def _read(
        self, normal: Tensor, spec: TensorSpec, layer: int | None, scale: Tensor | None = None
    ) -> Tensor:
        """What readers behind a norm get from its output, times what it still lacks."""
        # Behind post-norms there are none but in heads, whose readers map what they take.
        matrix = None if self._is_post_norm else self._map(spec, layer)
        if matrix is None:
            return normal if scale is None else apply_gate(normal, scale)
        kept = (self._gates or {}).get(KEPT_HIDDEN)
        if scale is not None:  # on the matrix, which is small: activations are not
            matrix = apply_gate(matrix, _select(scale, kept))
        before, after = (None, None)
        if self.architecture.is_final_norm(spec):
            before, after = self.tuning.shifts(self._gates is not None)
        normal = normal if before is None else normal + before.to(normal.dtype)
        output = map_read(normal, matrix, kept)
        return output if after is None else output + after.to(output.dtype)

    def layer_norm(self, norm: nn.Module, stream: Tensor, output: Tensor) -> Tensor:
        """What a LayerNorm gives of the stream where hidden dimensions are gone.

        Args:
            norm: the module, whose output for the whole stream is `output`.
            stream: its input, `(..., width)`.
            output: the same shape.
        """
        present = None if self._gates is None else self._gates.get(PRESENT_HIDDEN)
        if present is None or not isinstance(norm, nn.LayerNorm):
            return output
        width = self.architecture.num_units[Axis.HIDDEN] if self.tuning.is_rotated else None
        return weighted_layer_norm(stream, norm, present, width)

    def _keep_present(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._gates is None or PRESENT_HIDDEN not in self._gates:
            return None
        return (apply_gate(args[0], self._gates[PRESENT_HIDDEN]), *args[1:])

    def _projector(self, role: Role, layer: int | None) -> Tensor | None:
        name = PROJECTORS[role]
        return None if self._gates is None or name not in self._gates else self._gates[name][layer]

    def _project_input(self, layer: int | None) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            projector = self._projector(Role.OUTPUT, layer)
            return None if projector is None else (map_heads(args[0], projector), *args[1:])

        return hook

    def _project_output(self, dim: Dim, block: int, layer: int | None) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            projector = self._projector(Role.QUERY, layer)
            if projector is None:
                return None
            blocks = list(output.chunk(dim.num_blocks, dim=-1))
            blocks[block] = map_heads(blocks[block], projector)
            return torch.cat(blocks, dim=-1)

        return hook


def logits_of(output: Any) -> Tensor:
    """What a model's head says; the classes that compete lie in the last dimension.

    Returns:
        `(batch, seq, vocab)` of language models, `(batch, num_labels)` of classifiers,
        `(batch, num_choices)`, or start and end of an answer, `(batch, 2, seq)`.
    """
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=1)
    logits: Tensor = output.logits
    return logits


def _named(inputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Model inputs by name; tokens alone may come without one."""
    return {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs


def _select(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values.index_select(0, kept)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
