"""Masks against their formulas, and gates against autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as normal_kl

from llm_vtrans.masking.gating import apply_gate
from llm_vtrans.masking.masks import (
    THRESHOLD,
    VIBMasks,
    keep_probability,
    kl_divergence,
    log_alpha,
)

FINITE = st.floats(-5, 5).filter(lambda x: abs(x) > 1e-2)
LOG_VAR = st.floats(-12, 12)


def pair(mu: float, log_var: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([mu], dtype=torch.float64, requires_grad=True),
        torch.tensor([log_var], dtype=torch.float64, requires_grad=True),
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(mu=FINITE, log_var=LOG_VAR)
def test_kl_is_the_closed_form(mu: float, log_var: float) -> None:
    """Value and gradients of `0.5 log(1 + mu^2 / exp(log_var))`."""
    ours, plain = pair(mu, log_var), pair(mu, log_var)
    found = kl_divergence(*ours)
    expected = 0.5 * torch.log1p(plain[0].square() / plain[1].exp()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    found.backward()
    expected.backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-7)


@given(mu=FINITE, log_var=st.floats(-6, 3))
def test_kl_is_that_to_the_best_prior(mu: float, log_var: float) -> None:
    """KL(N(mu, s^2) || N(0, v)) is least at v = mu^2 + s^2, and there it is the closed form."""
    posterior = Normal(torch.tensor(mu).double(), torch.tensor(math.exp(log_var / 2)).double())
    best = mu**2 + math.exp(log_var)

    def to_prior(variance: float) -> float:
        zero = torch.zeros((), dtype=torch.float64)
        return float(normal_kl(posterior, Normal(zero, zero + math.sqrt(variance))))

    found = float(kl_divergence(*(t.detach() for t in pair(mu, log_var))))
    assert found == pytest.approx(to_prior(best), rel=1e-3, abs=1e-6)
    assert to_prior(best) < min(to_prior(0.9 * best), to_prior(1.1 * best))


def test_kl_by_numerical_integration() -> None:
    mu, log_var = 0.8, -1.0
    std, prior_std = math.exp(log_var / 2), math.sqrt(mu**2 + math.exp(log_var))
    z = torch.linspace(mu - 12 * std, mu + 12 * std, 200_001, dtype=torch.float64)
    posterior, prior = Normal(z.new_tensor(mu), std), Normal(z.new_tensor(0.0), prior_std)
    density = posterior.log_prob(z)
    integral = torch.trapezoid(density.exp() * (density - prior.log_prob(z)), z)
    found = kl_divergence(*(t.detach() for t in pair(mu, log_var)))
    torch.testing.assert_close(found, integral, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("log_var", [-300.0, 300.0])
@pytest.mark.parametrize("mu", [0.0, 1.0, 1e6])
def test_kl_stays_finite(mu: float, log_var: float) -> None:
    """Where the plain formula overflows in float32; a small variance keeps its gradient."""
    means = torch.tensor([mu], requires_grad=True)
    variances = torch.tensor([log_var], requires_grad=True)
    value = kl_divergence(means, variances)
    value.backward()
    assert means.grad is not None and variances.grad is not None
    assert all(torch.isfinite(t).all() for t in (value, means.grad, variances.grad))
    if log_var < 0:
        assert float(variances.grad) == pytest.approx(-0.5)


@given(mu=FINITE, log_var=LOG_VAR)
def test_log_alpha_is_the_noise_to_signal_ratio(mu: float, log_var: float) -> None:
    alpha = log_alpha(*pair(mu, log_var)).detach()
    assert float(alpha) == pytest.approx(log_var - 2 * math.log(abs(mu)), abs=1e-3)
    is_redundant = math.exp(log_var) > mu**2 + 1e-8
    assert is_redundant == bool(alpha > THRESHOLD)
    assert is_redundant == bool(keep_probability(alpha, 3.0) < 0.5)


def test_log_alpha_of_a_dead_unit_is_finite() -> None:
    alpha = log_alpha(torch.zeros(1), torch.tensor([-4.0]))
    assert float(alpha) == pytest.approx(-4 - math.log(1e-8), rel=1e-5)


def test_keep_probability_has_a_gradient_at_the_start() -> None:
    """At sharpness 10 it is flat there, at the first one it is not."""
    alpha = torch.tensor(-4.0, requires_grad=True)
    (steep,) = torch.autograd.grad(keep_probability(alpha, 10.0), alpha)
    (gentle,) = torch.autograd.grad(keep_probability(alpha, 0.5), alpha)
    assert abs(float(steep)) < 1e-15 and float(gentle) < -0.01


def test_start_and_names() -> None:
    shapes = {"hidden": (50_000,), "heads": (3, 7)}
    masks = VIBMasks(shapes, -4.0, seed=1)
    assert set(masks.names()) == set(shapes)
    assert {name: tuple(mu.shape) for name, mu in masks.mu.items()} == shapes
    assert all(p.dtype == torch.float32 for p in masks.parameters())
    for values, center in (
        (masks.mu["hidden"].detach(), 1.0),
        (masks.log_var["hidden"].detach(), -4.0),
    ):
        assert float(values.mean()) == pytest.approx(center, abs=1e-3)
        assert float(values.std()) == pytest.approx(0.01, rel=0.05)
    again, other = VIBMasks(shapes, -4.0, seed=1), VIBMasks(shapes, -4.0, seed=2)
    assert torch.equal(again.mu["heads"], masks.mu["heads"])
    assert not torch.equal(other.mu["heads"], masks.mu["heads"])


def test_samples_follow_the_generator_alone() -> None:
    masks = VIBMasks({"hidden": (64,), "ffn": (2, 64)}, -4.0, seed=0)
    first = masks.sample(generator(3))
    torch.manual_seed(99)  # the global generator plays no part
    again, other = masks.sample(generator(3)), masks.sample(generator(4))
    for name in masks.names():
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["ffn"][0], first["ffn"][1])


def test_samples_have_mean_and_variance() -> None:
    size, mu, log_var = 200_000, 0.7, -1.5
    masks = VIBMasks({"hidden": (size,), "ffn": (1, size)}, log_var, seed=0)
    with torch.no_grad():
        for name in masks.names():
            masks.mu[name].fill_(mu)
            masks.log_var[name].fill_(log_var)
        draws = [draw.flatten() for draw in masks.sample(generator(0)).values()]
    std = math.exp(log_var / 2)
    for draw in draws:
        assert float(draw.mean()) == pytest.approx(mu, abs=5 * std / math.sqrt(size))
        assert float(draw.var()) == pytest.approx(std**2, rel=5 * math.sqrt(2 / size))
    correlation = torch.corrcoef(torch.stack(draws))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(size)


def test_sample_gradient_is_reparameterised() -> None:
    masks = VIBMasks({"heads": (2, 3)}, -2.0, seed=0)
    draw = masks.sample(generator(5))["heads"]
    draw.sum().backward()
    mu, log_var = masks.mu["heads"], masks.log_var["heads"]
    torch.testing.assert_close(mu.grad, torch.ones(2, 3))
    torch.testing.assert_close(log_var.grad, (draw - mu).detach() / 2)


def test_weighted_kl() -> None:
    masks = VIBMasks({"hidden": (4,), "ffn": (2, 3)}, -4.0, seed=0)
    terms = {n: kl_divergence(masks.mu[n], masks.log_var[n]) for n in masks.names()}
    found = masks.kl({"hidden": 2.0, "ffn": 0.5})
    torch.testing.assert_close(found, 2 * terms["hidden"] + 0.5 * terms["ffn"])


def gated(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, a gate and a gradient from above."""
    draw = generator(0)
    x = torch.randn(5, 40, 12, generator=draw).to(dtype).requires_grad_()
    gate = (1 + 0.3 * torch.randn(12, generator=draw)).requires_grad_()
    return x, gate, torch.randn(5, 40, 12, generator=draw).to(dtype)


def test_gate_equals_multiplication_in_float32() -> None:
    x, gate, above = gated(torch.float32)
    found, expected = apply_gate(x, gate), x * gate
    assert torch.equal(found, expected)
    found_gradients = torch.autograd.grad(found, (x, gate), above)
    expected_gradients = torch.autograd.grad(expected, (x, gate), above)
    torch.testing.assert_close(found_gradients, expected_gradients)


def test_gate_gradient_is_summed_in_float32_under_bfloat16() -> None:
    x, gate, above = gated(torch.bfloat16)
    found = apply_gate(x, gate)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, x * gate.bfloat16())
    grad_x, grad_gate = torch.autograd.grad(found, (x, gate), above)
    assert grad_x.dtype == torch.bfloat16 and grad_gate.dtype == torch.float32
    assert torch.equal(grad_x, above * gate.bfloat16())
    products = (above.double() * x.double()).detach()
    error = (grad_gate - products.sum((0, 1))).abs()
    # Each product is rounded to bfloat16's 8 bits, their sum is not rounded again.
    assert bool((error <= 2**-8 * products.abs().sum((0, 1))).all())


def test_gate_gradient_holds_more_than_bfloat16() -> None:
    """4097 ones: bfloat16 has no such number."""
    x = torch.ones(4097, 1, dtype=torch.bfloat16)
    gate = torch.ones(1, requires_grad=True)
    apply_gate(x, gate).backward(torch.ones_like(x))
    assert gate.grad is not None and float(gate.grad) == 4097
