"""TUNE's optimizer: AdamW, but the stream's maps take steps of one length in every direction.

That is Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): the step is the mean
gradient with all singular values made one, by Newton-Schulz iterations (arXiv:2409.20325,
section 2). `torch.optim.Muon` does it at every step. The mean hardly changes within two
of them, so one step of twice the length comes nearly to the same for half of the work,
which would be a tenth of the training's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EVERY = 2  # steps of training for a step of the maps
MOMENTUM = 0.95  # as in torch.optim.Muon, with Nesterov's look ahead
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values of 0.03 to 1 end near one
ITERATIONS = 3
TINY = 1e-30  # below any gradient's norm


def orthogonalised(matrix: Tensor) -> Tensor:
    """Singular values near one in the place of a matrix's own.

    Args:
        matrix: `(rows, columns)`.

    Returns:
        The same shape; zero for zero.
    """
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    wide = wide / wide.norm().clamp(min=TINY)
    if wide.device.type != "cpu":  # there half the digits are many times faster, and enough
        wide = wide.bfloat16()
    linear, cubic, quintic = QUINTIC
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        terms = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.addmm(wide, terms, wide, beta=linear)
    return wide if matrix.size(0) <= matrix.size(1) else wide.T


class OrthogonalAdamW(torch.optim.AdamW):
    """AdamW without decay; groups with `is_orthogonal` hold matrices that take the other steps.

    Their learning rate is the length of a step in every direction (its spectral norm), or a
    little less. Their state is the mean gradient alone, half of Adam's.

    Args:
        groups: as `torch.optim.AdamW` takes them.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, weight_decay=0.0)

    def step(self, closure: Any = None) -> Any:
        """Takes a step; gradients of matrices that took theirs are gone then."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if group.get("is_orthogonal") and matrix.grad is not None:
                    self._move(matrix, matrix.grad, group["lr"])
                    matrix.grad = None  # nothing for AdamW to do
        return super().step(closure)

    @torch.no_grad()
    def _move(self, matrix: Tensor, gradient: Tensor, length: float) -> None:
        state = self.state[matrix]
        if not state:
            state["step"] = torch.tensor(0)
            state["mean"] = torch.zeros_like(matrix)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - MOMENTUM)
        if state["step"] % EVERY == 0:
            ahead = gradient.lerp(state["mean"], MOMENTUM)
            matrix.sub_(orthogonalised(ahead), alpha=EVERY * length)
