"""ROTATE: one global orthogonal change of basis of the residual stream.

RMSNorm commutes with an orthogonal map once its weight is folded into the readers
behind it (SliceGPT, arXiv:2401.15024, section 3). Here a single matrix `Q` serves
the whole network, so nothing is left over at run time: what writes to the stream is
multiplied by `Q^T`, what reads from it by `diag(norm) Q`, and norm weights become one.
In the basis of the stream's principal directions, hidden pruning drops directions
instead of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.basis.moments import add_moment
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import gathered, is_writer
from llm_vtrans.families.base import Architecture, Axis, Stream, TensorSpec
from llm_vtrans.masking.hooks import removed_after


@dataclass(frozen=True)
class Basis:
    """Directions of the residual stream, as columns of `(hidden_size, hidden_size)` float32.

    What they multiply is moved to their device.

    Attributes:
        at: of a tensor's row and, inside the layers, its layer. What writes to the stream is
            projected onto them, what reads from it sees coordinate i along direction i. After a
            plain rotation all are one orthogonal matrix; where there are none, the stream's own
            coordinates stay.
        is_rotated: whether norm weights are folded into what reads.
    """

    at: Callable[[TensorSpec, int | None], Tensor | None]
    is_rotated: bool

    @classmethod
    def rotation(cls, matrix: Tensor) -> Basis:
        """The basis after an orthogonal change `(hidden_size, hidden_size)`."""
        return cls(lambda spec, layer: matrix, is_rotated=True)

    def truncated(
        self,
        weight: Tensor,
        spec: TensorSpec,
        layer: int | None,
        kept: Tensor,
        norm_weight: Tensor | None,
    ) -> Tensor:
        """One tensor in the kept directions.

        Args:
            weight: of the dense model, any float dtype.
            spec: its row of the table.
            layer: index of the dense layer, None outside.
            kept: indices of the directions that stay, `(num_kept,)`.
            norm_weight: what the norm in front multiplies by, `(hidden_size,)`, for readers.
        """
        columns = self.at(spec, layer)
        if self.is_rotated:
            assert columns is not None
            return rotate_tensor(weight, spec, columns[:, kept], norm_weight)
        if columns is not None and (spec.is_write or spec.stream is Stream.READS):
            return _along_hidden(weight, spec, columns[:, kept])
        return select_hidden(weight, spec, kept)


def select_hidden(weight: Tensor, spec: TensorSpec, kept: Tensor) -> Tensor:
    """The entries of kept hidden dimensions, wherever a tensor has that axis."""
    for index, dim in enumerate(spec.dims):
        if dim.axis is Axis.HIDDEN:
            weight = weight.index_select(index, kept.to(weight.device))
    return weight


def _along_hidden(weight: Tensor, spec: TensorSpec, columns: Tensor) -> Tensor:
    """Contracts the hidden dimension, if there is one, with `(hidden_size, num_directions)`."""
    dim = spec.dim_of(Axis.HIDDEN)
    if dim is None:
        return weight
    return (weight.to(columns).movedim(dim, -1) @ columns).movedim(-1, dim)


def rotated_architecture(architecture: Architecture) -> Architecture:
    """The table after rotation: a tied head comes apart, as it absorbs the final norm."""
    if architecture.tied_head is None:
        return architecture
    head = TensorSpec(
        architecture.tied_head,
        architecture.embedding.dims,
        Stream.READS,
        norm=architecture.final_norm,
    )
    return replace(architecture, tensors=(*architecture.tensors, head), tied_head=None)


def tied_norm(weight: Tensor, basis: Tensor) -> Tensor:
    """What the final norm multiplies by in the new basis, where the head shares the embedding.

    The shared table cannot absorb it, as embeddings do not meet that norm, and a diagonal has no
    diagonal form in other directions.

    Args:
        weight: of the norm, `(hidden_size,)`.
        basis: `Q`, `(hidden_size, hidden_size)`.

    Returns:
        `Q^T diag(weight) Q`, symmetric, in the basis's dtype and on its device.
    """
    return basis.T @ (weight.to(basis)[:, None] * basis)


def rotate_tensor(
    weight: Tensor, spec: TensorSpec, basis: Tensor, norm_weight: Tensor | None
) -> Tensor:
    """One tensor in the new basis.

    Args:
        weight: of the dense model, any float dtype.
        spec: its row of the table.
        basis: `Q` `(hidden_size, num_directions)`; column i is the new direction i (fewer
            columns than rows truncate at once).
        norm_weight: what the norm in front multiplies by, `(hidden_size,)`, for readers.

    Returns:
        The rotated tensor in the basis's dtype and on its device (`weight` itself where nothing
        changes).
    """
    if spec.stream is Stream.APART:
        return weight
    if spec.stream is Stream.SCALES:
        return basis.new_ones(basis.shape[1]) - spec.offset
    dim = spec.dim_of(Axis.HIDDEN)
    if spec.stream is Stream.READS and dim is not None:
        assert norm_weight is not None, spec.name
        shape = [-1 if index == dim else 1 for index in range(weight.dim())]
        weight = weight.to(basis) * norm_weight.to(basis).view(shape)
    return _along_hidden(weight, spec, basis)


@torch.no_grad()
def rotate_model(model: nn.Module, architecture: Architecture, basis: Tensor) -> None:
    """Rotates a loaded model in place, one tensor in float32 at a time.

    Args:
        model: the library's model. If its head is tied, the final norm is missing afterwards:
            see `tied_norm`.
        architecture: its table.
        basis: `(hidden_size, hidden_size)` float32.
    """
    named = architecture.named_tensors()
    parameters = {name: model.get_parameter(name) for name in named}
    norms = {}
    for name, (spec, _) in named.items():
        if _scales(spec):
            with gathered([parameters[name]]):
                norms[name] = parameters[name].detach() + spec.offset
    for name, (spec, layer) in named.items():
        norm = norms[spec.norm.format(layer)] if spec.norm else None
        parameter = parameters[name]
        with gathered([parameter]):
            if is_writer(parameter):
                basis = basis.to(parameter.device)
                parameter.copy_(rotate_tensor(parameter, spec, basis, norm))


def _scales(spec: TensorSpec) -> bool:
    return spec.stream is Stream.SCALES


@torch.no_grad()
def principal_basis(
    model: nn.Module,
    architecture: Architecture,
    batches: list[Any],
    forward: Callable[[Any], object],
) -> Tensor:
    """Principal directions of the normalised residual stream, strongest first.

    Args:
        model: the library's model.
        architecture: its table; the inputs of all its norms are observed.
        batches: calibration inputs on the model's device.
        forward: runs the model on one batch.

    Returns:
        Orthogonal `(hidden_size, hidden_size)` float32: eigenvectors of the second moment of
        `x / rms(x)` over all tokens and norms, by descending eigenvalue.
    """
    size = architecture.num_units[Axis.HIDDEN]
    device = next(model.parameters()).device
    moment = torch.zeros(size, size, dtype=torch.float32, device=device)

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream = args[0].detach().flatten(0, -2)
        x = stream.float()
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)).to(stream.dtype)
        add_moment(moment, x, x)

    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(observe)
        for name, (spec, _) in architecture.named_tensors().items()
        if _scales(spec)
    ]
    with removed_after(hooks):
        for batch in batches:
            forward(batch)
    _, vectors = torch.linalg.eigh(moment.double())
    return agreed(vectors.flip(1).float().cpu().contiguous())
