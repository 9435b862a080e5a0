"""The search for the plan of least loss: at every depth, downhill."""

import pytest
import torch
from transformers import LlamaConfig

from llm_vtrans.allocation.allocate import PrunePlan, allocate
from llm_vtrans.allocation.plan_search import search_plan
from llm_vtrans.budget.problem import TOLERANCE, Problem
from llm_vtrans.families.base import Axis, Shape
from llm_vtrans.masking.masks import VIBMasks
from tests.unit.test_candidates import SMALL, all_plans, identity_basis, masks_for, stock_problem
from tests.unit.test_candidates import case as case


@pytest.mark.parametrize("ratio", [0.8, 1.3])
@pytest.mark.parametrize("is_oblique", [True, False])
def test_the_choice_goes_on_where_less_is_lost(
    case: tuple[VIBMasks, Problem], ratio: float, is_oblique: bool
) -> None:
    """The masks' balance of hidden dimensions and other units may be far from the best."""
    masks, problem = case
    first = allocate(masks, problem).shape.hidden
    size = problem.architecture.num_units[Axis.HIDDEN]
    basis = identity_basis(size) if is_oblique else None
    wanted = ratio * first
    plan = search_plan(masks, problem, lambda plan: abs(plan.shape.hidden - wanted), basis)
    assert abs(plan.shape.hidden - wanted) < 0.05 * first
    assert problem.cost.of(plan.shape) <= problem.budget.target


def test_layers_go_as_long_as_less_is_lost(case: tuple[VIBMasks, Problem]) -> None:
    """In the order of their scores, the first one never."""
    masks, problem = case
    first = allocate(masks, problem)
    fewest = min(int(plan.present.sum()) for plan in all_plans(masks, problem))
    plan = search_plan(masks, problem, lambda plan: float(plan.present.sum()))
    assert int(plan.present.sum()) <= fewest - (2 if problem.is_uniform else 1)
    assert bool((plan.present <= first.present).all()) and bool(plan.present[0].all())
    assert problem.cost.of(plan.shape) <= problem.budget.target


def test_the_choice_passes_by_sizes_that_cannot_use_the_budget() -> None:
    """In the stock layout of a small model whole FFN widths fill few hidden sizes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4,
    )  # fmt: skip
    problem = stock_problem(config, 0.3)
    masks = masks_for(problem, 0.0)
    first = allocate(masks, problem).shape.hidden
    plan = search_plan(masks, problem, lambda plan: abs(plan.shape.hidden - 0.6 * first))
    assert plan.shape.hidden < 0.65 * first
    assert problem.used(plan.shape) >= 1 - TOLERANCE


def test_each_plan_is_measured_once_and_no_number_is_no_success(
    case: tuple[VIBMasks, Problem],
) -> None:
    masks, problem = case
    first = allocate(masks, problem)
    losses: dict[tuple[Shape, float], float] = {}

    def loss(plan: PrunePlan) -> float:
        key = plan.shape, plan.strength
        assert key not in losses
        size = plan.shape.hidden
        losses[key] = size % 7 + sum(plan.shape.ffn) % 11 / 100 if size % 2 else float("nan")
        return losses[key]

    plan = search_plan(masks, problem, loss)
    assert (first.shape, 1) in losses
    least = min(value for value in losses.values() if value == value)
    assert losses[plan.shape, plan.strength] == least


@pytest.mark.parametrize("num_gone", [0, 1, 2, 3])
def test_a_depth_far_from_the_masks_is_reached_where_each_step_loses_less(num_gone: int) -> None:
    """Masks that spare no layer, or three of six."""
    problem = stock_problem(SMALL, 0.5)
    masks = masks_for(problem, -4.0)
    with torch.no_grad():
        for rank, layer in enumerate((4, 2, 1)[: 3 - num_gone]):
            masks.log_var["layers"][layer] += 5.0 - rank
    plan = search_plan(masks, problem, lambda p: abs(int((~p.present).any(1).sum()) - num_gone))
    assert int((~plan.present).any(1).sum()) == num_gone


@pytest.mark.parametrize("wanted", [0.0, 0.25, 1.0, 1.75])
def test_gates_are_as_strong_as_loses_least(case: tuple[VIBMasks, Problem], wanted: float) -> None:
    """Masks trained for one budget scale units by what suits that one."""
    masks, problem = case
    with torch.no_grad():
        for mu in masks.mu.values():
            mu.fill_(0.5)

    def loss(plan: PrunePlan) -> float:
        return abs(float(plan.gate["ffn"].mean()) - (1 - 0.5 * wanted))

    basis = identity_basis(problem.architecture.num_units[Axis.HIDDEN])
    for oblique in (basis, None):
        plan = search_plan(masks, problem, loss, oblique)
        gates = {name: gate for name, gate in plan.gate.items() if name != Axis.HIDDEN}
        assert plan.strength == wanted and loss(plan) < 1e-6
        assert all(bool((gate == 1 - 0.5 * wanted).all()) for gate in gates.values())
        hidden = 1.0 if plan.maps is not None else 1 - 0.5 * wanted
        assert bool((plan.gate["hidden"] == hidden).all())


def test_gates_of_another_strength_are_another_plan() -> None:
    """Where the masks, too, give up hidden dimensions alone, both have one shape."""
    problem = stock_problem(SMALL, 0.5)
    masks = masks_for(problem, -12.0)
    with torch.no_grad():
        masks.log_var["hidden"].copy_(torch.linspace(-4, 4, SMALL.hidden_size))
        for name in ("heads", "ffn"):
            masks.mu[name].fill_(0.5)
    measured = []

    def loss(plan: PrunePlan) -> float:
        measured.append((plan.shape, plan.strength))
        return plan.strength

    plan = search_plan(masks, problem, loss, identity_basis(SMALL.hidden_size))
    assert plan.strength == 0
    assert any((shape, 0) in measured and (shape, 1) in measured for shape, _ in measured)


@pytest.mark.parametrize("ratio", [0.7, 1.3])
def test_hidden_dimensions_go_on_going_while_less_is_lost_with_tuning(
    case: tuple[VIBMasks, Problem], ratio: float
) -> None:
    """Tuning makes good more of what went with them; so the loss before it stops too early."""
    masks, problem = case
    size = problem.architecture.num_units[Axis.HIDDEN]
    first = search_plan(masks, problem, lambda plan: plan.strength, identity_basis(size))
    tuned: list[int] = []

    def tuned_loss(plan: PrunePlan) -> float:
        assert problem.cost.of(plan.shape) <= problem.budget.target
        tuned.append(plan.shape.hidden)
        return abs(plan.shape.hidden - ratio * first.shape.hidden)

    plan = search_plan(masks, problem, lambda plan: plan.strength, identity_basis(size), tuned_loss)
    assert tuned[0] == first.shape.hidden and tuned == sorted(tuned, reverse=True)
    assert plan.strength == 0
    if ratio > 1:  # one more look, and one at a layer more
        looks = 1 if bool(first.present.all()) else 2
        assert plan.shape == first.shape and len(tuned) == 1 + looks
    else:
        assert plan.shape.hidden < 0.85 * first.shape.hidden
        assert plan.shape.hidden == min(tuned, key=lambda n: abs(n - ratio * first.shape.hidden))


@pytest.mark.parametrize("num_more", [0, 1, 2])
def test_layers_come_back_while_less_is_lost_with_tuning(
    case: tuple[VIBMasks, Problem], num_more: int
) -> None:
    """One after the other, in the order of their scores: tuning makes good less of what they do."""
    masks, problem = case
    step = 2 if problem.is_uniform else 1

    def loss(plan: PrunePlan) -> float:
        return float(plan.present.sum())

    first = search_plan(masks, problem, loss)
    tuned: list[Shape] = []

    def tuned_loss(plan: PrunePlan) -> float:
        tuned.append(plan.shape)
        return abs(loss(plan) - loss(first) - step * num_more)

    plan = search_plan(masks, problem, loss, tuned_loss=tuned_loss)
    assert tuned[0] == first.shape
    assert int(plan.present.sum()) == int(first.present.sum()) + step * num_more
    assert bool((plan.present >= first.present).all())
    depths = [sum(map(bool, (*shape.heads, *shape.ffn))) for shape in tuned]
    assert max(depths) == loss(first) + step * (num_more + 1)  # one more look
    assert all(problem.cost.of(shape) <= problem.budget.target for shape in tuned)


@pytest.mark.parametrize("most", range(6))
def test_no_more_plans_are_rehearsed_than_may_be(case: tuple[VIBMasks, Problem], most: int) -> None:
    """Then the best of those that were is taken; a single one would tell nothing."""
    masks, problem = case
    size = problem.architecture.num_units[Axis.HIDDEN]
    start = (masks, problem, lambda plan: plan.strength, identity_basis(size))
    tuned: list[Shape] = []

    def tuned_loss(plan: PrunePlan) -> float:
        tuned.append(plan.shape)
        return plan.shape.hidden

    plan = search_plan(*start, tuned_loss, most)
    assert len(tuned) == (most if most > 1 else 0)
    best = min(tuned, key=lambda shape: shape.hidden) if tuned else search_plan(*start).shape
    assert plan.shape == best


def test_a_loss_with_tuning_that_is_no_number_moves_nothing() -> None:
    problem = stock_problem(SMALL, 0.5)
    masks = masks_for(problem, -4.0)
    first = search_plan(masks, problem, lambda plan: plan.strength)
    plan = search_plan(
        masks, problem, lambda plan: plan.strength, tuned_loss=lambda _: float("nan")
    )
    assert (plan.shape, plan.strength) == (first.shape, first.strength)
