"""Candidate plans: all within the budget, and the one of least loss is taken."""

from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig

from llm_vtrans.allocation.allocate import PrunePlan, allocate
from llm_vtrans.allocation.candidates import _Shortlist, candidates, shortlist
from llm_vtrans.basis.oblique import ObliqueBasis
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import TOLERANCE, Problem
from llm_vtrans.families import family_for
from llm_vtrans.families.base import Axis, Shape
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.training.search import initial_shapes

ALL = ("hidden", "heads", "ffn", "layers")


# Wide enough that a single unit is far less than the tolerance of the budget.
CONFIG = LlamaConfig(
    vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
    num_attention_heads=12,
)  # fmt: skip


# One hidden dimension is 0.8% of it.
SMALL = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
    num_attention_heads=8,
)  # fmt: skip


def stock_problem(config: LlamaConfig, share: float) -> Problem:
    """A share of a model's parameters, in the stock layout."""
    architecture = family_for("llama").describe(config)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    return Problem(architecture, cost, Budget("params", int(share * dense), dense), 1, True)


def masks_for(problem: Problem, log_var: float) -> VIBMasks:
    """Masks of all structures, hardly trained."""
    shapes = initial_shapes(problem.architecture, ALL, problem.is_uniform)
    return VIBMasks(shapes, log_var, seed=0)


@pytest.fixture(params=[True, False])
def case(request: pytest.FixtureRequest) -> tuple[VIBMasks, Problem]:
    """Masks with a spread of log_alpha, one layer redundant, and half the parameters."""
    is_uniform = request.param
    architecture = family_for("llama").describe(CONFIG)
    masks = VIBMasks(initial_shapes(architecture, ALL, is_uniform), 0.0, seed=0)
    with torch.no_grad():
        for key, log_var in masks.log_var.items():
            log_var += 2 * torch.randn(log_var.shape, generator=torch.Generator().manual_seed(1))
            if key == "layers":
                log_var[:] = -4
                log_var[1] = 4
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    return masks, Problem(architecture, cost, Budget("params", dense // 2, dense), 1, is_uniform)


def test_candidates_meet_the_budget(case: tuple[VIBMasks, Problem]) -> None:
    masks, problem = case
    plans = list(candidates(masks, problem))
    first = allocate(masks, problem)
    assert plans[0].shape == first.shape
    assert len({plan.shape for plan in plans}) > 2
    for plan in plans:
        assert problem.cost.of(plan.shape) <= problem.budget.target
        least = min(problem.cost.of(first.shape), 0.999 * problem.budget.target)
        assert problem.cost.of(plan.shape) >= least
        assert plan.shape.is_uniform or not problem.is_uniform
    # Some keep the layer that the masks would remove.
    assert not bool(first.present[1].all()) and any(bool(plan.present.all()) for plan in plans)


@pytest.mark.parametrize("ratio", [0.8, 1.3])
@pytest.mark.parametrize("is_oblique", [True, False])
def test_the_choice_goes_on_where_less_is_lost(
    case: tuple[VIBMasks, Problem], ratio: float, is_oblique: bool
) -> None:
    """The masks' balance of hidden dimensions and other units may be far from the best."""
    masks, problem = case
    first = allocate(masks, problem).shape.hidden
    size = problem.architecture.num_units[Axis.HIDDEN]
    basis = ObliqueBasis(*[torch.eye(size, dtype=torch.float64)] * 2) if is_oblique else None
    wanted = ratio * first
    [(plan, loss)] = shortlist(masks, problem, lambda plan: abs(plan.shape.hidden - wanted), basis)
    assert loss == abs(plan.shape.hidden - wanted) < 0.05 * first
    assert problem.cost.of(plan.shape) <= problem.budget.target


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_shortlist_holds_the_best_of_plans_that_are_not_alike(
    case: tuple[VIBMasks, Problem], num: int
) -> None:
    masks, problem = case
    tried: dict[Shape, float] = {}

    def loss(plan: PrunePlan) -> float:
        size = plan.shape.hidden
        return tried.setdefault(plan.shape, size % 7 + sum(plan.shape.ffn) % 11 / 100)

    found = shortlist(masks, problem, loss, num=num)
    assert len(found) == num
    assert [value for _, value in found] == sorted(tried[plan.shape] for plan, _ in found)
    assert found[0][1] == min(tried.values())
    for (one, _), (other, _) in combinations(found, 2):
        sizes = [(p.shape.hidden, sum(p.shape.heads)) for p in (one, other)]
        ratio = max(max(pair) / min(pair) for pair in zip(*sizes, strict=True))
        assert ratio > 1.04 or not one.present.equal(other.present)


def test_plans_that_lack_different_layers_are_not_alike() -> None:
    """Of the same sizes; which of two layers to spare may show only after some training."""
    problem = stock_problem(SMALL, 0.7)
    plans = []
    for gone in (2, 3):
        masks = masks_for(problem, -4.0)
        with torch.no_grad():
            masks.log_var["layers"][gone] = 1.0
        plans.append(allocate(masks, problem))
    assert plans[0].shape.hidden == plans[1].shape.hidden
    best = _Shortlist(lambda plan: float(plan.present[2, 0]), 2)
    best.improves([*plans, *plans])
    assert [int(plan.present[2, 0]) for plan, _ in best.found] == [0, 1]


def test_one_more_layer_goes_where_less_is_lost(case: tuple[VIBMasks, Problem]) -> None:
    masks, problem = case
    first = allocate(masks, problem)
    fewest = min(int(plan.present.sum()) for plan in candidates(masks, problem))
    [(plan, _)] = shortlist(masks, problem, lambda plan: float(plan.present.sum()))
    assert int(plan.present.sum()) == fewest - (2 if problem.is_uniform else 1)
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
    [(plan, _)] = shortlist(masks, problem, lambda plan: abs(plan.shape.hidden - 0.6 * first))
    assert plan.shape.hidden < 0.65 * first
    assert problem.used(plan.shape) >= 1 - TOLERANCE


def test_an_oblique_basis_brings_plans_up_to_removing_hidden_dimensions_alone(
    case: tuple[VIBMasks, Problem],
) -> None:
    masks, problem = case
    size = problem.architecture.num_units[Axis.HIDDEN]
    basis = ObliqueBasis(*[torch.eye(size, dtype=torch.float64)] * 2)
    first, *others = candidates(masks, problem, basis)
    assert first.maps is None and all(plan.maps is not None for plan in others)
    untouched = [plan.shape for plan in others if bool(plan.present.all())]
    alone = [s for s in untouched if set(s.ffn) == {CONFIG.intermediate_size}]
    assert len({shape.hidden for shape in alone}) == 1
    between = sorted((first.shape.hidden, alone[0].hidden))
    steps = {s.hidden for s in untouched if between[0] < s.hidden < between[1]}
    assert len(steps) >= 3
    for plan in others:
        assert problem.cost.of(plan.shape) <= problem.budget.target


@pytest.mark.parametrize("num_gone", [0, 1, 2])
def test_layers_go_with_hidden_dimensions_and_hardly_anything_else(num_gone: int) -> None:
    """FFN units only fill what a hidden dimension would leave."""
    problem = stock_problem(SMALL, 0.7)
    masks = masks_for(problem, -4.0)
    with torch.no_grad():
        masks.log_var["layers"][1:3] = 1.0
    basis = ObliqueBasis(*[torch.eye(128, dtype=torch.float64)] * 2)
    found = {
        tuple(torch.nonzero(~plan.present.any(1)).flatten().tolist())
        for plan in candidates(masks, problem, basis)
        if max(plan.shape.ffn) > 0.95 * 352 and set(plan.shape.heads) <= {0, 8}
    }
    gone = {layers for layers in found if len(layers) == num_gone}
    assert gone >= ({(1,), (2,)} if num_gone == 1 else {(1, 2)} if num_gone else {()})
