"""The distance of two output distributions, a few tokens' logits at a time where it matters.

Logits of the whole vocabulary in float32 are by far the largest activations (32,000 words: 128
kB a token, several times over). So loss and gradient are computed from the hidden states in
chunks of tokens, and only the gradient with respect to the hidden states is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_LOGITS = 2**25  # of student or teacher at a time: 128 MiB in float32


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL from the unmasked to the masked network's distribution.

    Args:
        student: logits `(..., classes)`, such as `(batch, seq, vocab)`.
        teacher: the same, detached.

    Returns:
        Mean over predictions in nats, shape `()`, computed in float32; where the head gives one
        number, half the squared difference instead: the KL of two Gaussians of variance one.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float()) / 2
    loss: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2))
    return loss


class _Divergence(torch.autograd.Function):
    """Mean KL of rows of logits, `(predictions, classes)`, with half of autograd's work.

    With logits `t` and `s` of distributions `p` and `q` it is `p (t - s)` summed, less the
    difference of their normalisers, so that every exponential is taken once. The gradient is
    `q - p`, which are at hand in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        taught = F.softmax(teacher, dim=-1, dtype=torch.float32)
        learnt = F.softmax(student, dim=-1, dtype=torch.float32)
        wide = teacher.float()
        gap = teacher - student if wide is teacher else wide.sub_(student)
        terms = torch.linalg.vecdot(taught, gap)
        terms += _log_normaliser(student, learnt) - _log_normaliser(teacher, taught)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(learnt.sub_(taught))
            ctx.dtype = student.dtype
        return terms.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad * (grad_loss / len(grad))).to(ctx.dtype), None


def _log_normaliser(logits: Tensor, distribution: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of every row, told by its largest entry."""
    return logits.amax(-1).float() - distribution.amax(-1).log()


class _ChunkedDistillation(torch.autograd.Function):
    """Loss of all chunks; their gradients are taken at once, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: nn.Module,
        chunk: int,
        *weights: Tensor,
    ) -> Tensor:
        trained = [weight for weight in weights if weight.requires_grad]
        grad = torch.empty_like(student)
        weight_grads = [torch.zeros_like(weight) for weight in trained]
        loss = student.new_zeros((), dtype=torch.float32)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            hidden = student[part].detach().requires_grad_()
            with torch.no_grad():
                target = head(teacher[part])
            with torch.enable_grad():
                share = len(hidden) / len(student)
                term = distillation_loss(head(hidden), target) * share
                grads = torch.autograd.grad(term, [hidden, *trained])
            loss += term.detach()
            grad[part] = grads[0]
            for total, one in zip(weight_grads, grads[1:], strict=True):
                total += one
        ctx.is_trained = [weight.requires_grad for weight in weights]
        ctx.save_for_backward(grad, *weight_grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, *weight_grads = ctx.saved_tensors
        rest = iter(weight_grads)
        weights = [next(rest) * grad_loss if trained else None for trained in ctx.is_trained]
        return (grad * grad_loss, None, None, None, *weights)


def chunked_distillation(
    head: nn.Module, student: Tensor, teacher: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """`distillation_loss` of a head's logits, without ever holding all of them.

    Args:
        head: the output head, a module with a weight `(vocab, hidden)`.
        student: hidden states `(batch, seq, hidden)`; the gradient flows to them and to what is
            trained in the head.
        teacher: the same of the unmasked network, detached.
        chunk_logits: logits computed at a time.

    Returns:
        Mean over tokens in nats, shape `()`, float32.
    """
    vocab = int(head.out_features)  # type: ignore[arg-type]
    chunk = max(1, chunk_logits // vocab)
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if not torch.is_grad_enabled():
        pairs = zip(student.split(chunk), teacher.split(chunk), strict=True)
        terms = [distillation_loss(head(s), head(t)) * len(s) for s, t in pairs]
        return torch.stack(terms).sum() / len(student)
    loss: Tensor = _ChunkedDistillation.apply(student, teacher, head, chunk, *head.parameters())
    return loss
