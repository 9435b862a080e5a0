"""What a one-shot method sees of the model: weights, calibration tokens, input statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_vtrans.basis.head_basis import HeadBasis, balanced_basis
from llm_vtrans.basis.rotation import principal_basis, rotate_model, rotated_architecture
from llm_vtrans.errors import UserError
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.families.base import UNIT_AXES, Norm, Stream, TensorSpec
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import Source
from llm_vtrans.masking.hooks import removed_after

Importances = Mapping[str, Tensor]  # `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`, `layers (L, 1)`

BATCH_SIZE = 8  # calibration windows in a forward pass


@dataclass(frozen=True)
class Moments:
    """Per-feature statistics of a matrix's input over all calibration tokens, float64 `(in,)`."""

    count: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean of each feature."""
        return self.total / self.count

    @property
    def norm(self) -> Tensor:
        """L2 norm of each feature over all tokens."""
        return self.squares.sqrt()

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each feature."""
        centred = self.squares - self.total.square() / self.count
        return centred.clamp(min=0) / (self.count - 1)


@dataclass(frozen=True)
class Network:
    """A loaded model with what a selection may look at; nothing of it is ever scored.

    Attributes:
        source: the dense checkpoint.
        model: in float32, rotated if `basis` is there.
        architecture: its table, after rotation if there is one.
        windows: calibration tokens `(num_windows, seq_len)`.
        basis: rotation `(hidden_size, hidden_size)` float32, or None.
    """

    source: Source
    model: PreTrainedModel
    architecture: Architecture
    windows: Tensor
    basis: Tensor | None = None

    @classmethod
    def load(
        cls, source: Source, windows: Tensor, device: torch.device, is_rotated: bool = False
    ) -> Network:
        """Loads the dense model, rotated into its principal directions where that is wanted.

        Raises:
            UserError: the family's norm does not allow a rotation.
        """
        architecture = source.architecture
        if is_rotated:
            check_rotates(source)
            architecture = rotated_architecture(architecture)
        model = load_model(source, torch.float32, device, architecture)
        network = cls(source, model, architecture, windows.to(device))
        if not is_rotated:
            return network
        basis = principal_basis(model, architecture, network.batches, network.forward)
        rotate_model(model, architecture, basis)
        return replace(network, basis=basis)

    @property
    def batches(self) -> list[Tensor]:
        """Calibration tokens `(batch, seq)`."""
        return list(self.windows.split(BATCH_SIZE))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, seq, vocab)`."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def head_basis(self) -> HeadBasis:
        """Of the dimensions inside heads, the weakest of which go with hidden dimensions."""
        return balanced_basis(self.model, self.architecture, self.batches, self.forward)

    def weight(self, name: str) -> Tensor:
        """A parameter without its gradient."""
        return self.model.get_parameter(name).detach()

    def matrices(self) -> dict[str, tuple[TensorSpec, int | None]]:
        """Weights that multiply activations: all with two dimensions but lookup tables."""
        named = self.architecture.named_tensors()
        return {
            name: (spec, layer)
            for name, (spec, layer) in named.items()
            if len(spec.dims) == 2 and not spec.is_lookup
        }

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Input statistics of every matrix that reads or writes the residual stream."""
        sums: dict[str, list[Tensor]] = {}

        def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2)  # float32 within a batch, float64 over all
                part = [x.sum(0).double().cpu(), x.square().sum(0).double().cpu()]
                old = sums.get(name)
                sums[name] = (
                    part if old is None else [a + b for a, b in zip(old, part, strict=True)]
                )

            return hook

        with hooked(self.model, {name: observe(name) for name in self.matrices()}), torch.no_grad():
            for batch in self.batches:
                self.forward(batch)
        count = self.windows.numel()
        return {name: Moments(count, total, squares) for name, (total, squares) in sums.items()}


@contextmanager
def hooked(
    model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]]
) -> Iterator[None]:
    """Forward pre-hooks on the modules that own these weights, for as long as the block lasts."""
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
        for name, hook in hooks.items()
    ]
    with removed_after(handles):
        yield


def check_rotates(source: Source) -> None:
    """Raises UserError where an orthogonal change of basis would change the function."""
    if not source.architecture.rotates or source.architecture.norm is not Norm.RMS:
        raise UserError(f"{source.config.model_type}: its norm does not commute with a rotation")


def input_axis(spec: TensorSpec) -> Axis | None:
    """The prunable axis on a matrix's input side: units where it writes to the stream."""
    if spec.stream is Stream.READS:
        return Axis.HIDDEN
    return next((d.axis for d in spec.dims if d.axis not in (None, Axis.HIDDEN)), None)


def output_by_input(weight: Tensor, spec: TensorSpec) -> Tensor:
    """A matrix as float64 `(out, in)`, whichever way round the family stores it."""
    axis = input_axis(spec)
    dim = 1 if axis is None else spec.dim_of(axis)
    return (weight if dim == 1 else weight.T).double().cpu()


def per_unit(values: Tensor, num_units: int) -> Tensor:
    """Sums consecutive entries `(num_units * width,)` into `(num_units,)`."""
    return values.reshape(num_units, -1).sum(1)


def zeros(architecture: Architecture, *axes: Axis) -> dict[str, Tensor]:
    """A float64 accumulator per axis: `(d,)` for hidden, `(L, units)` for the others."""
    layers, units = architecture.num_layers, architecture.num_units
    return {
        axis.value: torch.zeros(
            (units[axis],) if axis is Axis.HIDDEN else (layers, units[axis]), dtype=torch.float64
        )
        for axis in axes
    }


def sum_over_groups(
    architecture: Architecture, saliency: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Sums a saliency of single weights over all weights that go when a unit goes.

    Args:
        architecture: says which dimension of which tensor belongs to which structure.
        saliency: parameter name -> one value per weight, in the parameter's shape.
    """
    totals = zeros(architecture, *UNIT_AXES)
    for name, (spec, layer) in architecture.named_tensors().items():
        values = saliency(name).double().cpu()
        for dim, labelled in enumerate(spec.dims):
            if labelled.axis is None:
                continue
            entries = values.movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
            sums = per_unit(entries, architecture.num_units[labelled.axis])
            at = ... if labelled.axis is Axis.HIDDEN else layer
            totals[labelled.axis][at] += sums
    return totals
