"""How far a student's residual stream is from its teacher's, layer by layer.

CoFi (arXiv:2204.00408, section 3.3): a few layers of the teacher, each matched to the layer of
the student that comes nearest, as layers of the student may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NUM_MATCHED = 4  # teacher layers at most, evenly spaced; CoFi's number


def spaced(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers of a teacher that are matched, the last one first."""
    num = min(NUM_MATCHED, len(layers))
    return [layers[-1 - len(layers) * i // num] for i in range(num)]


def layer_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    is_token: Tensor | None,
    matrix: Tensor | None = None,
) -> Tensor:
    """Mean over the teacher's layers of the distance to the nearest student layer.

    Args:
        student: streams behind the layers, `(batch, seq, hidden_size)` each.
        teacher: those to match, of the dense model.
        is_token: `(batch, seq)`, 0 at padding; None where there is none.
        matrix: `(hidden_size, hidden_size)`, maps the student's; None for the identity.

    Returns:
        Squared error in units of the teacher's square, token by token, as a few tokens of
        decoders are orders of magnitude larger than the others; shape `()`.
    """
    with torch.no_grad():
        pairs = [_distance(s, t, is_token, matrix) for t in teacher for s in student]
        nearest = torch.stack(pairs).view(len(teacher), len(student)).argmin(dim=1).tolist()
    matched = zip(nearest, teacher, strict=True)
    return torch.stack([_distance(student[i], t, is_token, matrix) for i, t in matched]).mean()


def _distance(
    student: Tensor, teacher: Tensor, is_token: Tensor | None, matrix: Tensor | None
) -> Tensor:
    mapped, target = student.float(), teacher.float()
    if matrix is not None:
        mapped = nn.functional.linear(mapped, matrix)
    error = (mapped - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return error.mean() if is_token is None else (error * is_token).sum() / is_token.sum()


def token_mask(batch: Any) -> Tensor | None:
    """`(batch, seq)` in the shape of hidden states: choices count as sequences."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.flatten(0, -2).float()
