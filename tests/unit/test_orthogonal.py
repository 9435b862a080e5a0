"""The tuning's optimizer: how long the steps of matrices are, and that others are AdamW's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_vtrans.training.orthogonal import EVERY, OrthogonalAdamW, orthogonalised

WIDTHS = st.integers(1, 40)


@given(WIDTHS, WIDTHS, st.integers(0, 9), st.floats(-15, 15))
def test_singular_values_are_near_one(rows: int, columns: int, seed: int, magnitude: float) -> None:
    """Of all that are not tiny beside the largest; directions stay, however large the matrix."""
    generator = torch.Generator().manual_seed(seed)
    matrix = 10**magnitude * torch.randn(rows, columns, generator=generator)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalised(matrix) @ right.T
    is_large = values > 0.2 * values.norm()
    assert (found.diag()[is_large] > 0.6).all() and (found.diag() < 1.25).all()
    torch.testing.assert_close(found, found.diag().diag(), rtol=0, atol=1e-3)


def test_no_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def optimizer_over(matrix: torch.nn.Parameter, vector: torch.nn.Parameter) -> OrthogonalAdamW:
    orthogonal = {"params": [matrix], "lr": 0.01, "is_orthogonal": True}
    return OrthogonalAdamW([orthogonal, {"params": [vector], "lr": 0.1}])


def test_matrices_move_by_the_learning_rate() -> None:
    """On average by its length, every so many steps, and against the gradient."""
    torch.manual_seed(0)
    gradient = torch.randn(24, 30)
    matrix, vector = (torch.nn.Parameter(torch.zeros(n)) for n in ((24, 30), (24,)))
    optimizer = optimizer_over(matrix, vector)
    for _ in range(2 * EVERY):
        matrix.grad, vector.grad = gradient.clone(), torch.ones(24)
        optimizer.step()
        assert matrix.grad is None
    assert torch.linalg.matrix_norm(matrix.detach(), 2) == pytest.approx(0.02 * EVERY, rel=0.2)
    assert (matrix * gradient).sum() < 0


def test_the_rest_is_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.eye(3))
    mine = optimizer_over(matrix, ours)
    adam = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for step in range(5):
        ours.grad = torch.arange(5.0) - step
        theirs.grad, matrix.grad = ours.grad.clone(), torch.eye(3)
        mine.step()
        adam.step()
    assert torch.equal(ours, theirs)


def test_a_matrix_without_a_gradient_stays() -> None:
    """One that no tensor meets, in a layer that went."""
    matrix, vector = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_over(matrix, vector)
    vector.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(matrix, torch.eye(3)) and matrix not in optimizer.state
