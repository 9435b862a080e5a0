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


def scattered(num: int, left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of mean zero whose rows and columns scatter as these factors say."""
    torch.manual_seed(0)
    return [left @ torch.randn(len(left), len(right)) @ right.T for _ in range(num)]


def graded(size: int) -> torch.Tensor:
    """A mixture of directions of which some are ten times the others."""
    mixing, _ = torch.linalg.qr(torch.randn(size, size))
    return mixing * torch.logspace(-0.5, 0.5, size)


def moved(gradients: list[torch.Tensor], last: torch.Tensor) -> torch.Tensor:
    """What a matrix does that sees these gradients, and then so many of another alone."""
    matrix, vector = (torch.nn.Parameter(torch.zeros(n)) for n in (last.shape, (3,)))
    optimizer = optimizer_over(matrix, vector)
    optimizer.param_groups[0]["lr"] = 0.0
    for gradient in gradients:
        matrix.grad = gradient.clone()
        optimizer.step()
    optimizer.state[matrix]["mean"].copy_(last)  # as many more steps would make it
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(EVERY):
        matrix.grad = last.clone()
        optimizer.step()
        assert matrix.grad is None
    return matrix.detach()


def test_steps_have_one_length_where_the_loss_is_curved_alike() -> None:
    """In coordinates that gradients scatter in alike, and against the gradient."""
    torch.manual_seed(1)
    left, right, last = graded(24), graded(30), torch.randn(24, 30)
    step = moved(scattered(128 * EVERY, left, right), last)
    scale = (left.square().mean() * 24 * right.square().mean() * 30).sqrt()
    lengths = torch.linalg.svdvals(left.T @ step @ right) / scale
    assert lengths.max() < 0.01 * EVERY * 1.6 and lengths.min() > 0.01 * EVERY * 0.2
    assert (step * last).sum() < 0


def test_where_gradients_scatter_alike_steps_have_the_learning_rate() -> None:
    torch.manual_seed(1)
    last = torch.randn(24, 30)
    step = moved(scattered(128 * EVERY, torch.eye(24), torch.eye(30)), last)
    assert torch.linalg.matrix_norm(step, 2) == pytest.approx(0.01 * EVERY, rel=0.3)


def test_a_gradient_that_is_no_number_is_left_to_the_loop() -> None:
    """It says which step it was and what to do; a decomposition would fail without that."""
    step = moved([torch.full((3, 4), torch.nan)] * EVERY, torch.ones(3, 4))
    assert not torch.isfinite(step).all()


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
