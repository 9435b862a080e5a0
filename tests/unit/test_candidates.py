"""Candidate plans: all within the budget, of every depth that comes into question."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from llm_vtrans.allocation.allocate import Allocator, PrunePlan, allocate, scores_and_gates
from llm_vtrans.allocation.candidates import Candidates
from llm_vtrans.basis.oblique import ObliqueBasis
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.families import family_for
from llm_vtrans.families.base import Axis
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


def stock_problem(config: PreTrainedConfig, share: float) -> Problem:
    """A share of a model's parameters, in the stock layout."""
    architecture = family_for(config.model_type).describe(config)
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


def all_plans(
    masks: VIBMasks, problem: Problem, basis: ObliqueBasis | None = None
) -> Iterator[PrunePlan]:
    """The first plan, and of each depth those that represent it and their neighbours."""
    candidates = Candidates(masks, problem, basis)
    yield candidates.first
    for kept in candidates.depths(candidates.first):
        for plan in candidates.of(kept):
            yield plan
            yield from candidates.around(plan)


def identity_basis(size: int) -> ObliqueBasis:
    """Every direction counts alike."""
    return ObliqueBasis(*[torch.eye(size, dtype=torch.float64)] * 2)


def gone_layers(plan: PrunePlan) -> tuple[int, ...]:
    """Which have neither sub-layer."""
    return tuple(torch.nonzero(~plan.present.any(1)).flatten().tolist())


def test_candidates_meet_the_budget(case: tuple[VIBMasks, Problem]) -> None:
    masks, problem = case
    plans = list(all_plans(masks, problem))
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


@pytest.mark.parametrize("num_gone", [0, 1, 2, 3])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_about_as_many_layers_go_as_from_a_plan(is_uniform: bool, num_gone: int) -> None:
    """Those of lowest score, or another in place of the last; never the first."""
    problem = replace(stock_problem(SMALL, 0.5), is_uniform=is_uniform)
    masks = masks_for(problem, -4.0)
    with torch.no_grad():
        for rank, layer in enumerate((4, 2, 0, 1, 5, 3)):
            masks.log_var["layers"][layer] -= 0.1 * rank
    present = torch.ones(6, 2, dtype=torch.bool)
    present[[4, 2, 1][:num_gone]] = False
    first = Candidates(masks, problem).first
    plan = replace(first, keep={n: k.clone() for n, k in first.keep.items()})
    for axis, row in ((Axis.HEADS, 0), (Axis.FFN, 1)):
        plan.keep[axis][:, 0] = 1
        plan.keep[axis][~present[:, row]] = 0
    assert plan.present.equal(present)
    found = [kept.tolist() for kept in Candidates(masks, problem).depths(plan)]
    assert found[0] == present.tolist() and [[True] * 2] * 6 in found
    counts = {sum(not part for row in kept for part in row) for kept in found}
    if is_uniform:
        order = [4, 2, 1, 5, 3]
        sets = [order[: num_gone + i] for i in (-1, 0, 1) if num_gone + i > 0]
        swaps = [[*chosen[:-1], order[len(chosen)]] for chosen in sets]
        wanted = [[[i not in gone] * 2 for i in range(6)] for gone in ([], *sets, *swaps)]
        assert sorted({str(kept) for kept in found}) == sorted(map(str, wanted))
    else:
        assert counts == {0, *(n for n in range(2 * num_gone - 1, 2 * num_gone + 2) if n > 0)}
    assert all(kept[0] == [True, True] for kept in found)


@pytest.mark.parametrize("num_gone", [0, 1, 2, 3])
def test_a_plan_keeps_the_layers_that_it_is_told_to(num_gone: int) -> None:
    """Whatever their scores are and at every hidden size, or there is no plan."""
    problem = stock_problem(SMALL, 0.5)
    masks = masks_for(problem, -4.0)
    with torch.no_grad():
        masks.log_var["layers"][1:3] = 4.0
    kept = torch.ones(6, 2, dtype=torch.bool)
    kept[1 : 1 + num_gone] = False
    allocator, found = Allocator(*scores_and_gates(masks), problem), []
    for size in range(60, 120, 3):
        with suppress(UserError):
            found.append(allocator.plan(kept, {Axis.HIDDEN: size}))
            assert found[-1].shape.hidden == size
    assert len(found) > 5 and all(plan.present.equal(kept) for plan in found)


def test_an_oblique_basis_brings_plans_up_to_removing_hidden_dimensions_alone(
    case: tuple[VIBMasks, Problem],
) -> None:
    masks, problem = case
    size = problem.architecture.num_units[Axis.HIDDEN]
    first, *others = all_plans(masks, problem, identity_basis(size))
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
    found = {
        gone_layers(plan)
        for plan in all_plans(masks, problem, identity_basis(128))
        if max(plan.shape.ffn) > 0.95 * 352 and set(plan.shape.heads) <= {0, 8}
    }
    gone = {layers for layers in found if len(layers) == num_gone}
    assert gone >= ({(1,), (2,)} if num_gone == 1 else {(1, 2)} if num_gone else {()})


def test_hidden_dimensions_alone_where_heads_must_divide_them() -> None:
    """Of the next sizes few can be had; what units stay are as they are all the same."""
    config = GPT2Config(
        vocab_size=2048, n_embd=128, n_inner=512, n_layer=4, n_head=4, n_positions=256
    )
    problem = stock_problem(config, 0.8)
    masks = masks_for(problem, -4.0)
    candidates = Candidates(masks, problem, identity_basis(128))
    plans = list(candidates.of(torch.ones(4, 2, dtype=torch.bool)))
    assert any(plan.strength == 0 and max(plan.shape.ffn) > 0.95 * 512 for plan in plans)


@pytest.mark.parametrize("share", [0.7, 0.65, 0.5])
def test_where_heads_must_divide_sizes_no_plan_leaves_the_budget_unused(share: float) -> None:
    config = GPT2Config(vocab_size=400, n_embd=48, n_layer=3, n_head=4, n_positions=128)
    problem = stock_problem(config, share)
    masks = masks_for(problem, -4.0)
    first, *others = all_plans(masks, problem, identity_basis(48))
    least = min(problem.used(first.shape), 0.999)
    assert others and all(least <= problem.used(plan.shape) <= 1 for plan in others)


def test_a_stream_that_stays_whole_keeps_its_basis() -> None:
    problem = stock_problem(SMALL, 0.7)
    masks = VIBMasks(initial_shapes(problem.architecture, ALL[1:], True), -4.0, seed=0)
    plans = list(all_plans(masks, problem, identity_basis(128)))
    assert len(plans) > 1
    assert all(plan.maps is None and plan.shape.hidden == 128 for plan in plans)
    candidates = Candidates(masks, problem)
    assert not list(candidates.beyond(plans[-1], 0.9))
