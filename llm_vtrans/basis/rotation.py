"""ROTATE: one global orthogonal change of basis of the residual stream.

RMSNorm commutes with an orthogonal map once its weight is folded into the readers
behind it (SliceGPT, arXiv:2401.15024, section 3). Here a single matrix `Q` serves
the whole network, so nothing is left over at run time: what writes to the stream is
multiplied by `Q^T`, what reads from it by `diag(norm) Q`, and norm weights become one.
In the basis of the stream's principal directions, hidden pruning drops directions
instead of coordinates.

LayerNorm subtracts the mean first, so it commutes with those orthogonal maps that keep every mean,
`Q^T 1 = 1`; its bias is folded into the readers' biases. Of `k` coordinates the mean takes one, so
they hold `k - 1` directions: see `level`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.basis.moments import add_moment, token_rows, tokens_of
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import gathered, is_writer
from llm_vtrans.families.base import Architecture, Axis, Norm, Stream, TensorSpec
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

        What a reader's bias takes on is not added here: see `through_reader`.

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
            weight = _along_hidden(weight, spec, columns[:, kept])
            return select_hidden(weight, spec, kept, spec.dim_of(Axis.HIDDEN))
        return select_hidden(weight, spec, kept)


def select_hidden(
    weight: Tensor, spec: TensorSpec, kept: Tensor, done: int | None = None
) -> Tensor:
    """The entries of kept hidden dimensions, wherever a tensor has that axis.

    Args:
        weight: any float dtype.
        spec: its row of the table.
        kept: `(num_kept,)`.
        done: a dimension that holds them already.
    """
    for index, dim in enumerate(spec.dims):
        if dim.axis is Axis.HIDDEN and index != done:
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


@dataclass(frozen=True)
class FinalNorm:
    """What the final norm does to its input in a new basis, where the head shares the embedding.

    The shared table cannot absorb it, as embeddings do not meet that norm, and a diagonal has no
    diagonal form in other directions.

    Attributes:
        matrix: symmetric, `(hidden_size, hidden_size)`.
        shift: what it adds then, `(hidden_size,)`; None if nothing.
    """

    matrix: Tensor
    shift: Tensor | None = None

    @classmethod
    def rotated(cls, weight: Tensor, bias: Tensor | None, basis: Tensor) -> FinalNorm:
        """`Q^T diag(weight) Q` and `Q^T bias`, in the basis's dtype and on its device.

        Args:
            weight: what the norm multiplies by, `(hidden_size,)`.
            bias: what it adds, `(hidden_size,)`; None if nothing.
            basis: `Q`, `(hidden_size, hidden_size)`.
        """
        matrix = basis.T @ (weight.to(basis)[:, None] * basis)
        return cls(matrix, None if bias is None else basis.T @ bias.to(basis))


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
    if spec.stream is Stream.SHIFTS:
        return basis.new_zeros(basis.shape[1])
    dim = spec.dim_of(Axis.HIDDEN)
    if spec.stream is Stream.READS and dim is not None:
        assert norm_weight is not None, spec.name
        shape = [-1 if index == dim else 1 for index in range(weight.dim())]
        weight = weight.to(basis) * norm_weight.to(basis).view(shape)
    return _along_hidden(weight, spec, basis)


def bias_of(norm: str) -> str:
    """Name of a norm's bias, given that of its weight."""
    return norm.removesuffix("weight") + "bias"


def through_reader(weight: Tensor, spec: TensorSpec, norm_bias: Tensor) -> Tensor:
    """What a reader makes of the bias of the norm in front, `(out,)` float32.

    Args:
        weight: of the dense reader, any float dtype.
        spec: its row of the table.
        norm_bias: `(hidden_size,)`.
    """
    return _along_hidden(weight, spec, norm_bias.float()[:, None]).squeeze()


@torch.no_grad()
def rotate_model(model: nn.Module, architecture: Architecture, basis: Tensor) -> None:
    """Rotates a loaded model in place, one tensor in float32 at a time.

    Args:
        model: the library's model. If its head is tied, the final norm is missing afterwards:
            see `FinalNorm`.
        architecture: its table.
        basis: `(hidden_size, hidden_size)` float32.
    """
    named = architecture.named_tensors()
    parameters = {name: model.get_parameter(name) for name in named}
    norms, moved = {}, {}
    for name, (spec, layer) in named.items():
        if _scales(spec):
            with gathered([parameters[name]]):
                norms[name] = parameters[name].detach() + spec.offset
        if spec.reader is not None:
            reader = architecture.row(spec.reader)
            assert reader.norm is not None, reader.name
            weight = parameters[reader.name.format(layer)]
            bias = parameters[bias_of(reader.norm).format(layer)]
            with gathered([weight, bias]):
                moved[name] = through_reader(weight, reader, bias)
    for name, (spec, layer) in named.items():
        norm = norms[spec.norm.format(layer)] if spec.norm else None
        parameter = parameters[name]
        with gathered([parameter]):
            if is_writer(parameter):
                basis = basis.to(parameter.device)
                parameter.copy_(rotate_tensor(parameter, spec, basis, norm))
                if name in moved:
                    parameter.add_(moved[name])


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
        `x / rms(x)` over all norms and all tokens but padding, by descending eigenvalue. Where
        norms subtract the mean, so is it here, and what is left is written in coordinates of that
        mean.
    """
    size = architecture.num_units[Axis.HIDDEN]
    device = next(model.parameters()).device
    has_mean = architecture.norm is Norm.LAYER
    moment = torch.zeros(size, size, dtype=torch.float32, device=device)
    rows: Tensor | None = None

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream = tokens_of(args[0].detach(), rows)
        x = stream.float()
        x = x - x.mean(-1, keepdim=True) if has_mean else x
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)).to(stream.dtype)
        add_moment(moment, x, x)

    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(observe)
        for name, (spec, _) in architecture.named_tensors().items()
        if _scales(spec)
    ]
    with removed_after(hooks):
        for batch in batches:
            rows = token_rows(batch)
            forward(batch)
    moment = moment.double()
    if has_mean:  # the direction of the mean comes last
        moment -= moment.trace() / size
    vectors = torch.linalg.eigh(moment)[1].flip(1)
    if has_mean:
        vectors[:, -1] = size**-0.5
        vectors = vectors @ level(size).to(vectors)
    return agreed(vectors.float().cpu().contiguous())


def level(size: int) -> Tensor:
    """The reflection that exchanges the last axis and the direction of the mean.

    Returns:
        Orthogonal, symmetric `(size, size)` float64. Its last column has equal entries; so the
        others are coordinates of vectors without mean.
    """
    mirror = torch.full((size,), size**-0.5, dtype=torch.float64)
    mirror[-1] -= 1
    return torch.eye(size, dtype=torch.float64) - 2 / mirror.square().sum() * mirror.outer(mirror)
