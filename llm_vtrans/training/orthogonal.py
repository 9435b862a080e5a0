"""TUNE's optimizer: AdamW, but the stream's maps take steps that count alike in every direction.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) makes all singular values of
a mean gradient one, by Newton-Schulz iterations (arXiv:2409.20325, section 2). But the stream's
directions are most unlike: what a step in one of them changes is hardly seen, in another it is
all. So steps have one length in coordinates in which the loss is curved alike everywhere. Near
the teacher its curvature in a map is about `L (x) R`, the second moments of what flows back to
the map's output and of its input (K-FAC, arXiv:1503.05671, section 3), and both can be told from
how gradients `G` scatter, as in Shampoo (arXiv:1802.09568): by the means of `G G^T` and `G^T G`.
With `L = A A^T` and `R = B B^T` the step is

    A^-T orth(A^-1 G B^-T) B^-1

Maps in one kind of place share `L` and `R`, so that few steps tell them. The mean gradient
hardly changes within two steps, so one step of twice the length comes nearly to the same for half
of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.basis.moments import add_moment

EVERY = 2  # steps of training for a step of the maps
MOMENTUM = 0.95  # as in torch.optim.Muon, with Nesterov's look ahead
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values of 0.03 to 1 end near one
ITERATIONS = 3
TINY = 1e-30  # below any gradient's norm
SIDES = ("left", "right")
DAMPING = 0.01  # of the mean curvature: every direction counts a little


def orthogonalised(matrix: Tensor) -> Tensor:
    """Singular values near one in the place of a matrix's own.

    Args:
        matrix: `(rows, columns)`.

    Returns:
        The same shape; zero for zero.
    """
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    wide = _quick(wide / wide.norm().clamp(min=TINY))
    linear, cubic, quintic = QUINTIC
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        terms = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.addmm(wide, terms, wide, beta=linear)
    return wide if matrix.size(0) <= matrix.size(1) else wide.T


class OrthogonalAdamW(torch.optim.AdamW):
    """AdamW without decay; groups with `is_orthogonal` hold matrices that take the other steps.

    All in such a group have one shape, and share the moments of their gradients. Their learning
    rate is about the length of a step in every direction (its spectral norm), where the loss is
    curved alike. Of every matrix the mean gradient is kept, half of Adam's state, and of a group,
    with its first matrix, four squares.

    Args:
        groups: as `torch.optim.AdamW` takes them.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, weight_decay=0.0)

    def step(self, closure: Any = None) -> Any:
        """Takes a step; gradients of matrices that took theirs are gone then."""
        for group in self.param_groups:
            if group.get("is_orthogonal"):
                self._move([m for m in group["params"] if m.grad is not None], group["lr"])
        return super().step(closure)

    @torch.no_grad()
    def _move(self, matrices: list[Tensor], length: float) -> None:
        """Takes the step of matrices that share moments, if it is time."""
        moments: list[Tensor] = []
        for matrix in matrices:
            state, gradient = self.state[matrix], _gradient(matrix)
            if not state:
                state["step"] = torch.tensor(0)
                state["mean"] = torch.zeros_like(matrix)
            state["step"] += 1
            if state["step"] % EVERY == 0:
                moments = moments or [gradient.new_zeros(n, n) for n in gradient.shape]
                _add_moments(moments, gradient - state["mean"])
            state["mean"].lerp_(gradient, 1 - MOMENTUM)
        if moments:
            shared = self.state[matrices[0]]
            _observe(shared, moments)
            left, right = (_quick(shared[f"{side}_inverse"]) for side in SIDES)
            for matrix in matrices:
                ahead = _quick(_gradient(matrix).lerp(self.state[matrix]["mean"], MOMENTUM))
                even = orthogonalised(left @ ahead @ right.T)
                matrix.sub_(left.T @ even @ right, alpha=EVERY * length)
        for matrix in matrices:
            matrix.grad = None  # nothing for AdamW to do


def _gradient(matrix: Tensor) -> Tensor:
    assert matrix.grad is not None
    return matrix.grad


def _quick(matrix: Tensor) -> Tensor:
    """A matrix for products: but for CPUs half the digits are many times faster, and enough."""
    return matrix if matrix.device.type == "cpu" else matrix.bfloat16()


def _add_moments(moments: Sequence[Tensor], gradient: Tensor) -> None:
    """Adds `G G^T` and `G^T G` of a gradient, scaled to a norm of one."""
    gradient = _quick(gradient / gradient.norm().clamp(min=TINY))
    for total, rows in zip(moments, (gradient.T, gradient), strict=True):
        add_moment(total, rows, rows)


def _observe(shared: dict[str, Tensor], moments: Sequence[Tensor]) -> None:
    """Adds to what a group's gradients say of the curvature.

    Args:
        shared: `left` and `right`, means of the moments so far, and for both the inverse of its
            factor, made again whenever the number of observations has doubled.
        moments: of one step, left and right, sums over the matrices.
    """
    number = int(shared["step"]) // EVERY
    for side, total in zip(SIDES, moments, strict=True):
        # Not their number: matrices of what went have gradients of zero, or none.
        moment = total / total.diagonal().mean().clamp(min=TINY)
        shared[side] = shared[side].lerp(moment, 1 / number) if side in shared else moment
        if number & (number - 1) == 0:
            shared[f"{side}_inverse"] = _whitening(shared[side])


def _whitening(moment: Tensor) -> Tensor:
    """`A^-1` of `A A^T`, a second moment with a mean diagonal of one and damped."""
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    factor, _ = torch.linalg.cholesky_ex(moment.double() + DAMPING * identity)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.to(moment.dtype)
