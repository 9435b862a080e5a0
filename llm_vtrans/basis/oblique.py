"""Which subspace of the residual stream the output needs, and how best to project onto it.

PCA keeps the directions of largest variance, whatever reads them. Here a direction counts by
both: with the second moment `C` of what the norms hand to the readers and the Fisher information
`F` of the network's own predictions at the same places, a projector `P` of rank k costs

    E ||F^(1/2) (I - P) x||^2 = tr F (I - P) C (I - P)^T

to second order. The best one is oblique: balanced truncation (Moore 1981, IEEE TAC 26(1)). With
`F = L L^T` and `U` the first k eigenvectors of `L^T C L` it is `P = L^-T U U^T L^T`. What is
written is projected by `U^T L^T`, what is read sees the columns of `L^-T U`; these are made
orthonormal, so that norms see the length of the projected stream.

A head that shares the embedding's table reads along what embeddings write, so the two are not free:
see `TiedBasis`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_vtrans.basis.moments import add_moment, token_rows, tokens_of
from llm_vtrans.basis.rotation import level
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.families.base import Architecture, Axis, Norm, Place, Stream
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.hooks import removed_after

RIDGE = 0.01  # of the mean Fisher information: every direction counts a little


@dataclass(frozen=True)
class ObliqueBasis:
    """Moments of the stream behind its norms, float64, each with a mean diagonal of one.

    Attributes:
        inputs: `C`, `(hidden_size, hidden_size)`.
        fisher: `F`, `(hidden_size, hidden_size)`.
    """

    inputs: Tensor
    fisher: Tensor
    is_needed: ClassVar[bool] = False  # else a plan may keep dimensions of the network's own

    @property
    def _damped_fisher(self) -> Tensor:
        fisher = self.fisher
        return fisher + RIDGE * torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`Q R` of `L^-T U`, and `U^T L^T`, for all eigenvectors `U`, most important first.

        Those of fewer eigenvectors are their leading parts.
        """
        lower = torch.linalg.cholesky(self._damped_fisher)
        _, vectors = torch.linalg.eigh(lower.T @ self.inputs @ lower)
        vectors = vectors.flip(1)
        read, mixing = torch.linalg.qr(torch.linalg.solve_triangular(lower.T, vectors, upper=True))
        factors = agreed(tuple(f.cpu() for f in (read, mixing, vectors.T @ lower.T)))
        read, mixing, written = (factor.to(self.fisher.device) for factor in factors)
        return read, mixing, written

    def maps(self, size: int) -> dict[Place, Tensor]:
        """The best projection that keeps `size` dimensions, as maps of `Tuning`.

        Returns:
            `write` whose first `size` rows and `read` whose first `size` columns are the
            projection, both `(hidden_size, hidden_size)` float32 where the moments are.
        """
        read, mixing, written = self._factors
        write = mixing[:size, :size] @ written[:size]
        identity = torch.eye(len(read), device=read.device)
        return {
            Place.WRITE: torch.cat([write.float(), identity[size:]]),
            Place.READ: torch.cat([read[:, :size].float(), identity[:, size:]], dim=1),
        }


@dataclass(frozen=True)
class TiedBasis(ObliqueBasis):
    """The best projection of a stream that a tied head reads; no other will do there.

    Embeddings write rows of `E N`, as that is the table, so the head computes `E N diag(s) N^T x`
    from a stream `x`. The dense one has the final norm's matrix `G` in the middle, and with all
    directions `N diag(s) N^T = G` where `N = G^(1/2) O` with orthonormal `O` and equal `s`. So the
    stream is taken in coordinates `G^(1/2) x`, where the projection is orthogonal. There directions
    count by the geometric mean of `C` and `F` (Pusz and Woronowicz 1975, Rep. Math. Phys. 8):
    where the two commute, its eigenvalues are the roots of what leaving a direction out costs.

    Attributes:
        final_norm: `G`, the matrix of `FinalNorm`, `(hidden_size, hidden_size)`.
    """

    final_norm: Tensor
    is_needed: ClassVar[bool] = True

    @cached_property
    def _maps(self) -> dict[Place, Tensor]:
        root = _root(self.final_norm.double(), RIDGE)
        moment = root @ self.inputs @ root
        fisher = _from_both_sides(root, self._damped_fisher)
        directions = torch.linalg.eigh(_geometric_mean(fisher, moment))[1].flip(1)
        square = moment.trace() / self.inputs.trace()
        stretch = square.sqrt()  # taken back, so that norms see the length that they saw
        maps = {
            Place.WRITE: (root @ directions / stretch).T,
            Place.READ: torch.linalg.solve(root, directions) * stretch,
            Place.END: torch.stack([square.expand(len(root)), square.new_zeros(len(root))]),
        }
        found = agreed(tuple(tensor.float().cpu().contiguous() for tensor in maps.values()))
        return {p: t.to(self.inputs.device) for p, t in zip(maps, found, strict=True)}

    def maps(self, size: int) -> dict[Place, Tensor]:
        """The same for every size, and at `end` what the final norm multiplies by and adds."""
        return self._maps


@dataclass(frozen=True)
class LevelBasis:
    """The same for a stream of which norms subtract the mean.

    Moments and maps are of its other directions, one less than dimensions: see `level`.

    Attributes:
        directions: basis of `hidden_size - 1` dimensions.
        shift: what the final norm adds to the dense stream, `(hidden_size,)`.
    """

    directions: TiedBasis
    shift: Tensor
    is_needed: ClassVar[bool] = True

    def maps(self, size: int) -> dict[Place, Tensor]:
        """As `TiedBasis`; zero where dimensions are not kept."""
        found = self.directions.maps(size - 1)
        width = len(self.shift)
        outer, inner = (level(n).to(found[Place.WRITE]) for n in (width, size))
        rows, columns = found[Place.WRITE][: size - 1], found[Place.READ][:, : size - 1]
        mean = rows.new_ones(1, 1)
        write, read = rows.new_zeros(2, width, width)
        write[:size] = inner @ torch.block_diag(rows, mean) @ outer.T
        read[:, :size] = outer @ torch.block_diag(columns, mean) @ inner.T
        end = rows.new_zeros(2, width)
        end[0] = found[Place.END][0, 0]
        end[1, :size] = inner @ self._shift_along(rows, outer.T @ self.shift.to(rows))
        return {Place.WRITE: write, Place.READ: read, Place.END: end}

    @staticmethod
    def _shift_along(rows: Tensor, wanted: Tensor) -> Tensor:
        """What to add where a head reads along these rows and, last, the mean."""
        table = rows.double()
        least = torch.linalg.solve(table @ table.T, table @ wanted[:-1].double())
        return torch.cat([agreed(least.cpu()).to(wanted), wanted[-1:]])


AnyBasis = ObliqueBasis | LevelBasis


def _root(matrix: Tensor, least: float = 0.0) -> Tensor:
    """Symmetric square root; eigenvalues are lifted to this share of their mean size."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(least * values.abs().mean()).sqrt() @ vectors.T


def _from_both_sides(root: Tensor, matrix: Tensor) -> Tensor:
    """`R^-1 A R^-1` of symmetric matrices."""
    return torch.linalg.solve(root, torch.linalg.solve(root, matrix).T)


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """`A^(1/2) (A^(-1/2) B A^(-1/2))^(1/2) A^(1/2)`; only `A` must be positive definite."""
    root = _root(a)
    return root @ _root(_from_both_sides(root, b)) @ root


def oblique_basis(
    masked: MaskedModel, architecture: Architecture, batches: Iterable[Any], seed: int
) -> AnyBasis | None:
    """Observes the unmasked network.

    Args:
        masked: the network; its gates are taken off.
        architecture: its table; the outputs of all norms of the stream are observed.
        batches: calibration inputs on the model's device.
        seed: of the labels that are drawn from the network's predictions.

    Returns:
        The basis, or None if gradients overflowed or vanished; of a tied head's network, which
        cannot do without, then the one in which variance alone counts.
    """
    size = architecture.num_units[Axis.HIDDEN]
    outputs: list[Tensor] = []

    def observe(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[-1]

    hooks = [
        # In front of the masked network's: a tied head is behind a matrix of its own.
        masked.model.get_submodule(path).register_forward_hook(observe, prepend=True)
        for name, (spec, _) in architecture.named_tensors().items()
        if spec.stream is Stream.SCALES and (path := name.removesuffix(".weight"))
    ]
    masked.set_gates(None)
    moments: list[Tensor] = []
    with removed_after(hooks), torch.enable_grad():
        for number, batch in enumerate(batches):
            outputs.clear()
            rows = token_rows(batch)
            surprise = _surprise(masked(batch), seed + number)
            seen = tuple(outputs)
            grads = torch.autograd.grad(surprise, seen)
            if not moments:
                moments = [seen[0].new_zeros(size, size, dtype=torch.float32) for _ in range(2)]
            for moment, tensors in zip(moments, (seen, grads), strict=True):
                for tensor in tensors:
                    tokens = tokens_of(tensor.detach(), rows)
                    add_moment(moment, tokens, tokens)
    final_norm, has_mean = masked.tuning.final_norm, architecture.norm is Norm.LAYER
    if has_mean:
        outer = level(size)[:, :-1].to(moments[0].device)
        moments = [outer.T @ moment.double() @ outer for moment in moments]
    inputs, fisher = (moment.double() / moment.diagonal().double().mean() for moment in moments)
    is_finite = agreed(bool(torch.isfinite(inputs).all() and torch.isfinite(fisher).all()))
    if final_norm is None:
        return ObliqueBasis(inputs, fisher) if is_finite else None
    alike = torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    fisher = fisher if is_finite else alike
    if not has_mean:
        return TiedBasis(inputs, fisher, final_norm.matrix)
    assert final_norm.shift is not None, "LayerNorms have biases"
    matrix = outer.T @ final_norm.matrix.double() @ outer
    return LevelBasis(TiedBasis(inputs, fisher, matrix), final_norm.shift)


def _surprise(logits: Tensor, seed: int) -> Tensor:
    """Negative log-likelihood of labels drawn from the predictions.

    The second moment of its gradient is the Fisher information. A regression's labels are
    normal around the output.
    """
    logits = logits.float().flatten(0, -2)
    generator = torch.Generator(logits.device).manual_seed(seed)
    if logits.shape[-1] == 1:
        noise = torch.randn(logits.shape, generator=generator, device=logits.device)
        return (logits * noise).sum()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return F.cross_entropy(logits, labels[:, 0], reduction="sum")
