"""Allocation: the budget is met from below, shapes are allowed ones, better units stay."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

from llm_vtrans.allocation.allocate import PrunePlan, allocate
from llm_vtrans.allocation.candidates import Candidates
from llm_vtrans.allocation.shape_choice import Ranking, choose_uniform
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem, check_reachable
from llm_vtrans.errors import UserError
from llm_vtrans.families import Axis, Sublayer, family_for
from llm_vtrans.families.base import UNIT_AXIS, Shape
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.training.search import initial_shapes

LAYERS, HIDDEN, FFN, HEADS = 6, 96, 404, 8  # 404 is no multiple of 8
ARCHITECTURE = family_for("llama").describe(
    LlamaConfig(
        vocab_size=500,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
)
HEAD_DIM = HIDDEN // HEADS
COST = parameter_cost(ARCHITECTURE)
DENSE = COST.of(dense_shape(ARCHITECTURE))
ALL = ("hidden", "heads", "ffn", "layers")
SUBSETS = [ALL, ("hidden", "heads", "ffn"), ("hidden", "ffn"), ("heads", "ffn"), ("ffn",)]

seeds = st.integers(0, 2**32 - 1)
sparsities = st.floats(0.1, 0.8)


def problem_of(sparsity: float, is_uniform: bool, round_to: int = 1) -> Problem:
    budget = Budget("params", int((1 - sparsity) * DENSE), DENSE)
    return Problem(ARCHITECTURE, COST, budget, round_to, is_uniform)


def random_masks(structures: tuple[str, ...], is_uniform: bool, seed: int) -> VIBMasks:
    """Masks of random `log_alpha` on both sides of the threshold, tied units included."""
    masks = VIBMasks(initial_shapes(ARCHITECTURE, structures, is_uniform), 0.0, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in masks.names():
            masks.mu[name].copy_(torch.randn(masks.mu[name].shape, generator=draw))
            spread = 3 * torch.randn(masks.mu[name].shape, generator=draw)
            masks.log_var[name].copy_(spread)
            masks.log_var[name].view(-1)[:2] = 0.0
            masks.mu[name].view(-1)[:2] = 1.0
    return masks


def reachable(problem: Problem, structures: tuple[str, ...]) -> bool:
    try:
        check_reachable(problem, frozenset(structures))
    except UserError:
        return False
    return True


def plan_of(
    structures: tuple[str, ...], sparsity: float, is_uniform: bool, seed: int, round_to: int = 1
) -> tuple[PrunePlan, VIBMasks, Problem] | None:
    """A plan for random masks; None where no shape meets the budget."""
    problem = problem_of(sparsity, is_uniform, round_to)
    masks = random_masks(structures, is_uniform, seed)
    if not reachable(problem, structures):
        with pytest.raises(UserError, match="unreachable"):
            allocate(masks, problem)
        return None
    return allocate(masks, problem), masks, problem


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("structures", [*SUBSETS, ("hidden",), ("heads",), ("hidden", "layers")])
@given(sparsity=sparsities, seed=seeds, round_to=st.sampled_from([1, 8]))
@settings(max_examples=6, deadline=None)
def test_never_above_the_budget(
    structures: tuple[str, ...], is_uniform: bool, sparsity: float, seed: int, round_to: int
) -> None:
    found = plan_of(structures, sparsity, is_uniform, seed, round_to)
    if found is None:
        return
    plan, _, problem = found
    shape = plan.shape
    assert COST.of(shape) <= problem.budget.target
    assert shape.heads[0] > 0  # caches read their length in the first attention
    for axis, whole, counts in (
        ("hidden", HIDDEN, (shape.hidden,)),
        ("heads", HEADS, shape.heads),
        ("ffn", FFN, shape.ffn),
    ):
        assert all(0 <= n <= whole for n in counts)
        if axis not in structures:
            assert set(counts) <= ({whole, 0} if "layers" in structures else {whole})
    if "layers" not in structures:
        assert all(shape.heads) and all(shape.ffn)
    if is_uniform:
        assert shape.is_uniform


@pytest.mark.parametrize("structures", SUBSETS)
@given(sparsity=st.floats(0.1, 0.7), seed=seeds)
@example(sparsity=0.15625, seed=504454)  # all but two sub-layers whole, one hidden dimension gone
@settings(max_examples=6, deadline=None)
def test_per_layer_comes_close(structures: tuple[str, ...], sparsity: float, seed: int) -> None:
    """Within 0.1% of the budget: a unit of the FFN costs less than that here."""
    found = plan_of(structures, sparsity, False, seed)
    if found is None:
        return
    plan, _, problem = found
    assert problem.budget.target - COST.of(plan.shape) <= 1e-3 * problem.budget.target


@pytest.mark.parametrize("structures", [ALL, ("hidden", "heads", "ffn"), ("hidden", "ffn")])
@given(sparsity=sparsities, seed=seeds)
@example(sparsity=0.1640625, seed=0)  # five layers of six that are nearly whole move in 0.2%
@settings(max_examples=6, deadline=None)
def test_uniform_comes_close(structures: tuple[str, ...], sparsity: float, seed: int) -> None:
    """With hidden sizes to choose from; the FFN alone moves in steps of all layers."""
    found = plan_of(structures, sparsity, True, seed)
    assert found is not None
    plan, _, problem = found
    assert problem.budget.target - COST.of(plan.shape) <= 1e-3 * problem.budget.target


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("round_to", [8, 16])
@given(sparsity=st.floats(0.1, 0.6), seed=seeds)
@settings(max_examples=6, deadline=None)
def test_multiples(is_uniform: bool, round_to: int, sparsity: float, seed: int) -> None:
    found = plan_of(ALL, sparsity, is_uniform, seed, round_to)
    assert found is not None
    shape = found[0].shape
    assert shape.hidden % round_to == 0 or shape.hidden == HIDDEN
    assert all(n * HEAD_DIM % round_to == 0 or n == HEADS for n in shape.heads)
    assert all(n % round_to == 0 or n == FFN for n in shape.ffn)


@pytest.mark.parametrize("is_uniform", [True, False])
@given(sparsity=sparsities, seed=seeds)
@settings(max_examples=6, deadline=None)
def test_better_units_stay(is_uniform: bool, sparsity: float, seed: int) -> None:
    found = plan_of(ALL, sparsity, is_uniform, seed)
    assert found is not None
    plan, masks, _ = found
    for name, alpha in masks.log_alpha().items():
        if name == "layers":
            continue
        width = plan.keep[name].shape[-1]
        rows = zip(plan.keep[name].view(-1, width), alpha.detach().view(-1, width), strict=True)
        for keep, row in rows:
            if keep.any() and not keep.all():
                assert float(row[keep].max()) <= float(row[~keep].min())


@given(sparsity=sparsities, seed=seeds)
@settings(max_examples=6, deadline=None)
def test_better_units_stay_across_layers(sparsity: float, seed: int) -> None:
    """FFN units cost the same in every layer; only a layer's best one stays regardless."""
    found = plan_of(ALL, sparsity, False, seed)
    assert found is not None
    plan, masks, _ = found
    alpha, keep = masks.log_alpha()["ffn"].detach(), plan.keep["ffn"]
    present = keep.any(1)
    forced = torch.zeros_like(keep).scatter_(1, alpha.argmin(1, keepdim=True), True)
    chosen, dropped = keep & ~forced, ~keep & present[:, None]
    if chosen.any() and dropped.any():
        assert float(alpha[chosen].max()) <= float(alpha[dropped].min())


@pytest.mark.parametrize("is_uniform", [True, False])
def test_redundant_layers_go(is_uniform: bool) -> None:
    """A noisy sub-layer goes where the budget does not need it."""
    masks = VIBMasks(initial_shapes(ARCHITECTURE, ALL, is_uniform), -4.0, seed=0)
    with torch.no_grad():
        masks.log_var["layers"][3] = 4.0
    shape = allocate(masks, problem_of(0.5, is_uniform)).shape
    assert shape.kept_layers == (0, 1, 2, 4, 5)
    assert not any(shape.units(part)[3] for part in Sublayer)


def test_gates_are_the_means() -> None:
    masks = random_masks(("hidden", "ffn"), False, 5)
    plan = allocate(masks, problem_of(0.4, False))
    hard = plan.hard()
    for name in ("hidden", "ffn"):
        assert torch.equal(plan.gate[name], masks.mu[name].detach())
        assert torch.equal(hard[name], masks.mu[name].detach() * plan.keep[name])
    assert bool((plan.gate["heads"] == 1).all()) and bool((plan.gate["layers"] == 1).all())


def test_removed_sublayers_are_gated_off() -> None:
    masks = random_masks(ALL, False, 1)
    with torch.no_grad():
        masks.log_var["layers"][2, 1] = 30.0
    plan = allocate(masks, problem_of(0.7, False))
    for index, part in enumerate(Sublayer):
        gone = ~plan.keep[UNIT_AXIS[part]].any(1)
        assert bool((plan.hard()["layers"][gone, index] == 0).all())
    assert not plan.keep[Axis.FFN][2].any()


@given(
    sparsity=st.floats(0.1, 0.8),
    seed=seeds,
    structures=st.sampled_from([ALL, ("hidden", "heads", "ffn"), ("hidden", "ffn")]),
    round_to=st.sampled_from([1, 8]),
)
@settings(max_examples=20, deadline=None)
def test_stock_heads_fill_the_hidden_size(
    sparsity: float, seed: int, structures: tuple[str, ...], round_to: int
) -> None:
    """GPT-2's config knows no head_dim: dimensions inside heads go so that all fits."""
    config = GPT2Config(
        vocab_size=500, n_embd=HIDDEN, n_inner=FFN, n_layer=LAYERS, n_head=HEADS, n_positions=64
    )
    architecture = family_for("gpt2").describe(config)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    budget = Budget("params", int((1 - sparsity) * dense), dense)
    problem = Problem(architecture, cost, budget, round_to, True)
    masks = random_masks(structures, True, seed)
    if not reachable(problem, structures):
        with pytest.raises(UserError, match="unreachable"):
            allocate(masks, problem)
        return
    shape = allocate(masks, problem).shape
    heads = shape.heads[shape.kept_layers[0]]
    assert shape.head_dim is not None and shape.head_dim <= HEAD_DIM
    assert heads * shape.head_dim == shape.hidden and shape.is_uniform
    assert shape.hidden % round_to == 0
    if "heads" not in structures:
        assert heads == HEADS
    assert cost.of(shape) <= budget.target


def test_heads_alone_cannot_go_where_they_make_up_the_hidden_size() -> None:
    config = GPT2Config(vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    architecture = family_for("gpt2").describe(config)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    problem = Problem(architecture, cost, Budget("params", int(0.9 * dense), dense), 1, True)
    with pytest.raises(UserError, match="nothing can go with --prune heads"):
        check_reachable(problem, frozenset({"heads"}))


@given(sparsity=st.floats(0.1, 0.7), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_heads_divide_the_hidden_size_where_the_stock_config_demands_it(
    sparsity: float, seed: int
) -> None:
    """A llama with biases cannot be written as mistral, which takes any number."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=200, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, attention_bias=True,
    )  # fmt: skip
    architecture = family_for("llama").describe(config)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    budget = Budget("params", int((1 - sparsity) * dense), dense)
    problem = Problem(architecture, cost, budget, 1, True)
    masks = VIBMasks(initial_shapes(architecture, ALL, True), 0.0, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in masks.names():
            masks.log_var[name].copy_(3 * torch.randn(masks.mu[name].shape, generator=draw))
    candidates = Candidates(masks, problem)
    for plan in (candidates.first, *candidates.around(candidates.first)):
        written = family_for("llama").stock_config(config.to_dict(), plan.shape)
        assert written["hidden_size"] % written["num_attention_heads"] == 0


@pytest.mark.parametrize("sparsity", [0.3, 0.4, 0.45, 0.5])
def test_among_full_shapes_the_largest_benefit(sparsity: float) -> None:
    """Groups of heads that cost whole FFN units leave the same unused, however many stay."""
    grouped = family_for("llama").describe(
        LlamaConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=4,
        )
    )  # fmt: skip
    cost = parameter_cost(grouped)
    dense = cost.of(dense_shape(grouped))
    problem = Problem(grouped, cost, Budget("params", int((1 - sparsity) * dense), dense), 1, True)
    benefits = {
        "hidden": torch.ones(128, dtype=torch.float64),
        "heads": torch.full((6, 4), 30.0, dtype=torch.float64),
        "ffn": torch.linspace(0.01, 0.9, 352, dtype=torch.float64).expand(6, 352),
    }
    ranking = Ranking(benefits, benefits, frozenset({"heads", "ffn"}), {"heads": 1, "ffn": 1})
    present = torch.ones(6, 2, dtype=torch.bool)
    best = -1.0
    for heads in range(1, 5):
        fixed = choose_uniform(ranking, present, replace(problem, fixed={Axis.HEADS: heads}))
        if fixed is not None:  # else no FFN unit is left
            best = max(best, benefit_of(ranking, fixed))
    chosen = choose_uniform(ranking, present, problem)
    assert chosen is not None and benefit_of(ranking, chosen) == best


def benefit_of(ranking: Ranking, shape: Shape) -> float:
    """What one layer keeps of heads and FFN units."""
    return sum(
        float(ranking.gains[axis][0, units[0] - 1])
        for axis, units in ((Axis.HEADS, shape.heads), (Axis.FFN, shape.ffn))
    )
