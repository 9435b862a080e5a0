"""Task metrics against their definitions, on small cases worked by hand."""

import math

import pytest
import torch

from llm_vtrans.tasks import metrics


def test_classification() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0, 1, 1])  # predicted 1 1 0 0 1: 2 hits, 1 false, 1 missed
    scores = metrics.classification(logits, labels)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (3 + 3))
    tp, tn, fp, fn = 2, 1, 1, 1
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / root)
    assert set(metrics.classification(torch.eye(3), torch.arange(3))) == {"accuracy"}


def test_a_constant_prediction_correlates_with_nothing() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 4)
    scores = metrics.classification(logits, torch.tensor([0, 1, 0, 1]))
    assert scores["matthews"] == 0 and scores["f1"] == 0


def test_correlations() -> None:
    labels = torch.tensor([1.0, 2.0, 2.0, 5.0])
    scores = metrics.regression(torch.tensor([[1.0], [4.0], [4.0], [100.0]]), labels)
    assert scores["spearman"] == pytest.approx(1)  # equal values share their rank
    expected = torch.corrcoef(torch.stack([torch.tensor([1.0, 4.0, 4.0, 100.0]), labels]))[0, 1]
    assert scores["pearson"] == pytest.approx(float(expected), abs=1e-6)


def test_spans() -> None:
    """The best span never ends before it starts; overlap counts in F1."""
    start, end = torch.zeros(2, 6), torch.zeros(2, 6)
    start[0, 2], end[0, 3] = 5, 5  # 2..3, exact
    start[1, 4], end[1, 1], end[1, 5] = 9, 8, 4  # 4..5 is possible, 4..1 is not
    logits = torch.stack([start, end], dim=1)
    scores = metrics.spans(logits, torch.tensor([2, 5]), torch.tensor([3, 5]))
    assert scores["exact_match"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 2 * 1 / (2 + 1)) / 2)


def test_token_nll_counts_only_what_is_predicted() -> None:
    logits = torch.zeros(2, 3, 8)
    labels = torch.tensor([[1, -100, -100], [-100, 2, 3]])
    found = metrics.token_nll(logits, labels)
    assert found["num"] == 3 and found["nll"] == pytest.approx(3 * math.log(8), abs=1e-5)
