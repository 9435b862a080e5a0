"""The metrics of GLUE, of spans and of masked tokens, from logits and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

TWO_CLASSES = ("f1", "matthews")  # what these alone have beside accuracy


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, and for two classes F1 of class 1 and Matthews' correlation.

    Args:
        logits: `(num, classes)`.
        labels: `(num,)`.
    """
    predicted = logits.argmax(-1)
    scores = {"accuracy": accuracy(logits, labels)}
    if logits.shape[-1] == 2:
        scores |= {"f1": f1(predicted, labels), "matthews": pearson(predicted, labels)}
    return scores


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).double().mean())


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1; 0 where it neither occurs nor is predicted."""
    hits = int((predicted * labels).sum())
    total = int(predicted.sum() + labels.sum())
    return 2 * hits / total if total else 0.0


def pearson(left: Tensor, right: Tensor) -> float:
    """Correlation of two vectors; of two binary ones it is Matthews'. 0 if one is constant."""
    x, y = left.double() - left.double().mean(), right.double() - right.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0


def spearman(left: Tensor, right: Tensor) -> float:
    """Correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(left), _ranks(right))


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def regression(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Both correlations of `(num, 1)` predictions."""
    values = logits.flatten()
    return {"spearman": spearman(values, labels), "pearson": pearson(values, labels)}


def spans(logits: Tensor, first: Tensor, last: Tensor) -> dict[str, float]:
    """Exact match and token F1 of the best span of `(num, 2, seq)` logits, over tokens."""
    exact, overlap = [], []
    for (start, end), a, b in zip(logits, first.tolist(), last.tolist(), strict=True):
        best = torch.triu(start[:, None] + end[None, :]) + torch.tril(
            torch.full((len(start), len(start)), -math.inf), diagonal=-1
        )
        i, j = divmod(int(best.argmax()), len(start))
        exact.append((i, j) == (a, b))
        common = max(0, min(j, b) - max(i, a) + 1)
        overlap.append(2 * common / (j - i + 1 + b - a + 1))
    return {"f1": sum(overlap) / len(overlap), "exact_match": sum(exact) / len(exact)}


def token_nll(logits: Tensor, labels: Tensor) -> Mapping[str, float]:
    """Summed negative log-likelihood in nats of the tokens to predict, and their number.

    Args:
        logits: `(batch, seq, vocab)`.
        labels: `(batch, seq)`, -100 where nothing is predicted.
    """
    nll = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return {"nll": float(nll), "num": float((labels != -100).sum())}
