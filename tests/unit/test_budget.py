"""Costs, the Lagrangian and the schedules of target and sharpness."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_vtrans.budget.cost import (
    Budget,
    Cost,
    Lagrangian,
    complete,
    dense_shape,
    mac_cost,
    parameter_cost,
)
from llm_vtrans.families import Architecture, Axis, Shape, family_for
from llm_vtrans.masking.masks import SHARPNESS, VIBMasks, keep_probability
from llm_vtrans.training.search import INITIAL_LOG_VAR, initial_shapes, sharpness_at, target_at
from tests.tiny import CONFIGS, tiny_model

ALL = ("hidden", "heads", "ffn", "layers")


def architecture_of(name: str) -> Architecture:
    return family_for(CONFIGS[name].model_type).describe(CONFIGS[name])


def costs_of(architecture: Architecture) -> list[Cost]:
    return [parameter_cost(architecture), mac_cost(architecture, 20)]


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_cost_is_the_models(name: str) -> None:
    architecture = architecture_of(name)
    count = sum(p.numel() for p in tiny_model(name).parameters())
    assert parameter_cost(architecture).of(dense_shape(architecture)) == count


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_expected_cost_of_certainty_is_exact(name: str, data: st.DataObject) -> None:
    """Probabilities 0 and 1: the polynomial gives the integer count, whichever units they are."""
    architecture = architecture_of(name)
    layers, units = architecture.num_layers, architecture.num_units

    def counts(axis: Axis) -> tuple[int, ...]:
        row = st.lists(st.integers(0, units[axis]), min_size=layers, max_size=layers)
        return tuple(data.draw(row))

    shape = Shape(
        data.draw(st.integers(1, units[Axis.HIDDEN])), counts(Axis.HEADS), counts(Axis.FFN)
    )
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def some(count: int, size: int) -> torch.Tensor:
        keep = torch.zeros(size, dtype=torch.float64)
        keep[torch.randperm(size, generator=draw)[:count]] = 1
        return keep

    keep = {
        "hidden": some(shape.hidden, units[Axis.HIDDEN]),
        "heads": torch.stack([some(n, units[Axis.HEADS]) for n in shape.heads]),
        "ffn": torch.stack([some(n, units[Axis.FFN]) for n in shape.ffn]),
        "layers": torch.tensor(list(zip(shape.heads, shape.ffn, strict=True))).bool().double(),
    }
    for cost in costs_of(architecture):
        assert float(cost.expected(keep)) == cost.of(shape)


def test_expected_cost_is_the_mean_over_draws() -> None:
    """Independent units: the polynomial of probabilities is the expectation of the count."""
    architecture = architecture_of("llama")
    cost = parameter_cost(architecture)
    draw = torch.Generator().manual_seed(0)
    shapes = initial_shapes(architecture, ALL, is_uniform=False)
    keep = {n: torch.rand(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
    counts = torch.stack(
        [
            cost.expected({n: torch.bernoulli(p, generator=draw) for n, p in keep.items()})
            for _ in range(4000)
        ]
    )
    spread = float(counts.std()) / len(counts) ** 0.5
    assert float(counts.mean()) == pytest.approx(float(cost.expected(keep)), abs=5 * spread)


def test_every_unit_has_a_gradient_at_the_start() -> None:
    architecture = architecture_of("llama")
    shapes = initial_shapes(architecture, ALL, is_uniform=True)
    masks = VIBMasks(shapes, INITIAL_LOG_VAR, seed=0)
    keep = complete(masks.keep_probability(sharpness_at(0)), architecture)
    parameter_cost(architecture).expected(keep).backward()
    for parameter in masks.parameters():
        assert parameter.grad is not None and bool((parameter.grad.abs() > 1e-3).all())


@pytest.mark.parametrize("residual", [0.3, -0.3])
def test_the_multiplier_raises_the_penalty_of_a_violation(residual: float) -> None:
    """It ascends: the penalty grows, and it pushes the residual back to zero."""
    lagrangian = Lagrangian()
    optimizer = torch.optim.AdamW([lagrangian.parameter_group()], weight_decay=0.0)
    penalties, pushes = [], []
    for _ in range(5):
        gap = torch.tensor(residual, requires_grad=True)
        penalty = lagrangian(gap)
        penalties.append(float(penalty.detach()))
        optimizer.zero_grad()
        penalty.backward()
        assert gap.grad is not None
        pushes.append(-float(gap.grad))
        optimizer.step()
    assert penalties[0] > 0 and penalties == sorted(set(penalties))
    assert all(push * residual < 0 for push in pushes)
    assert float(lagrangian.multiplier.detach()) == pytest.approx(5 * residual, rel=0.5)


@pytest.mark.parametrize("largest", [0.4, 4.0, 20.0])  # nats, of losing everything
def test_the_budget_is_met_without_losing_more(largest: float) -> None:
    """Units of rising worth: the expected share follows its target, and the least useful go."""
    worth = torch.linspace(0, largest, 500) / 500
    log_alpha = torch.full((500,), -4.0, requires_grad=True)
    lagrangian = Lagrangian()
    groups = [lagrangian.parameter_group(), {"params": [log_alpha], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    excess = []
    for step in range(300):
        keep = keep_probability(log_alpha, sharpness_at(step / 300))
        residual = (1 - keep).mean() - target_at(step, 300, 0.1, 0.5, "linear")
        loss = (worth * (1 - keep)).sum() + lagrangian(residual)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        excess.append(float(residual.detach()))
    assert max(excess) < 0.2 and max(map(abs, excess[-50:])) < 0.03
    lost = log_alpha > 0
    assert float(lost.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert worth[lost].max() < worth[~lost].min() + 0.05 * worth.max()


def test_a_met_constraint_leaves_the_multiplier() -> None:
    lagrangian = Lagrangian()
    lagrangian(torch.zeros(())).backward()
    for parameter in lagrangian.parameters():
        assert parameter.grad is not None and not bool(parameter.grad.any())


def test_uniform_cost_looks_at_the_widest_layers() -> None:
    """In the stock layout one count serves all layers: the expected one lies near the largest."""
    architecture = architecture_of("llama")
    layers, units = architecture.num_layers, architecture.num_units[Axis.FFN]
    cost = parameter_cost(architecture)

    def cost_of(shares: torch.Tensor, is_uniform: bool) -> torch.Tensor:
        ffn = shares[:, None].expand(layers, units)
        return cost.expected(complete({"ffn": ffn}, architecture), is_uniform)

    same = torch.full((layers,), 0.5, dtype=torch.float64)
    assert float(cost_of(same, True)) == pytest.approx(float(cost_of(same, False)))
    shares = torch.linspace(0.2, 0.8, layers, dtype=torch.float64).requires_grad_()
    widest = torch.full((layers,), 0.8, dtype=torch.float64)
    found = cost_of(shares, True)
    assert cost_of(shares, False) < found <= cost_of(widest, True) * (1 + 1e-9)
    found.backward()
    assert shares.grad is not None and bool((shares.grad.diff() > 0).all())


def test_budget_sparsity() -> None:
    assert Budget("params", 30, 120).sparsity == 0.75


@pytest.mark.parametrize(("target", "warmup"), [(0.5, 10), (0.7, 20)])
def test_target_warms_up(target: float, warmup: int) -> None:
    start, steps = 0.1, 100
    targets = [target_at(step, steps, start, target, "linear") for step in range(steps)]
    assert targets[0] == start
    assert targets[warmup // 2] == pytest.approx((start + target) / 2)
    assert targets[warmup - 1] < target
    assert targets[warmup:] == pytest.approx([target] * (steps - warmup))
    assert target_at(1, 3, start, target, "linear") == pytest.approx(
        target
    )  # however short the run


def test_cubic_schedule_is_fast_at_first() -> None:
    targets = [target_at(step, 100, 0.1, 0.5, "cubic") for step in range(100)]
    rises = [b - a for a, b in pairwise(targets)]
    assert targets[0] == pytest.approx(0.1) and targets[50:] == pytest.approx([0.5] * 50)
    assert rises[:50] == sorted(rises[:50], reverse=True)


def test_sharpness_is_annealed_geometrically() -> None:
    first, last = SHARPNESS
    assert sharpness_at(0) == first and sharpness_at(1) == pytest.approx(last)
    assert sharpness_at(0.5) ** 2 == pytest.approx(first * last)
