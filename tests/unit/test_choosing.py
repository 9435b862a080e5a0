"""Plans are told apart by what their networks lose."""

import math
from dataclasses import replace

import pytest
from accelerate import Accelerator

from llm_vtrans.allocation.allocate import allocate
from llm_vtrans.allocation.candidates import Candidates, Fit
from llm_vtrans.allocation.choosing import Chooser
from llm_vtrans.allocation.plan_search import search_plan
from llm_vtrans.basis.head_basis import balanced_basis
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.tasks.encoding import Examples
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.loop import TrainingSettings
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.rehearsal import Rehearsal
from llm_vtrans.training.search import initial_shapes
from tests.tiny import tiny_model
from tests.unit.test_exactness import random_plan
from tests.unit.test_tuning import architecture_of, fresh, tokens


@pytest.fixture
def case() -> tuple[Chooser, VIBMasks, Problem]:
    """Half of a tiny model, in the per-layer layout."""
    architecture = architecture_of("llama")
    masked = MaskedModel(tiny_model("llama"), architecture, fresh("llama"))
    masks = VIBMasks(initial_shapes(architecture, ("hidden", "heads", "ffn"), False), 0.0, 0)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    problem = Problem(architecture, cost, Budget("params", dense // 2, dense), 1, False)
    batches = [{"input_ids": tokens(4)}]
    return Chooser(SelfDistillation(masked), masks, batches, None, None), masks, problem


def test_the_plan_of_least_loss_is_chosen(case: tuple[Chooser, VIBMasks, Problem]) -> None:
    chooser, masks, problem = case
    plan = search_plan(masks, problem, chooser.loss)
    chosen = chooser.choose(problem)
    assert chosen.shape == plan.shape
    assert chooser.loss(chosen) < chooser.loss(allocate(masks, problem))


def test_the_fit_of_least_loss_is_taken(case: tuple[Chooser, VIBMasks, Problem]) -> None:
    """Of those that are not known yet; with none, there is no plan."""
    chooser, masks, problem = case
    plan = chooser.choose(problem)
    smaller = replace(
        problem, budget=replace(problem.budget, target=problem.budget.target * 4 // 5)
    )
    sizes = range(plan.shape.hidden // 2, plan.shape.hidden, 4)
    fits = [Fit(plan, smaller, hidden, max(plan.shape.heads)) for hidden in sizes]
    plans = [fitted for fit in fits for fitted in Candidates(masks, smaller).fitted(fit)]
    assert all(smaller.cost.of(fitted.shape) <= smaller.budget.target for fitted in plans)
    losses = {fitted.shape: chooser.loss(fitted) for fitted in plans}
    assert len(losses) > 2
    first, second, *_ = sorted(losses, key=lambda shape: losses[shape])
    for known, expected in (([], first), ([first], second)):
        found = chooser.refit(fits, known)
        assert found is not None and found.shape == expected
    assert chooser.refit(fits, [*losses]) is None


def test_what_was_fitted_to_one_plan_is_forgotten_for_the_next(
    case: tuple[Chooser, VIBMasks, Problem],
) -> None:
    chooser, masks, problem = case
    fit_to = [{"input_ids": tokens(16)}]
    one, other = chooser.choose(problem), allocate(masks, problem)
    first = chooser.fitted(one, fit_to)
    assert first < chooser.loss(one)
    assert chooser.fitted(other, fit_to) != first
    assert chooser.fitted(one, fit_to) == first


@pytest.fixture
def rehearsal() -> Rehearsal:
    """Of a tuning of which it is an eighth."""
    settings = TrainingSettings(0, 120, 4, 1, 0.1, 0.0, 0, 100, 100, True)
    examples = Examples({"input_ids": tokens(64)})
    return Rehearsal(examples, Accelerator(cpu=True), settings, Preemption(), print)


def test_of_a_rehearsal_nothing_stays_but_the_choice(
    case: tuple[Chooser, VIBMasks, Problem],
    rehearsal: Rehearsal,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Plans are rehearsed from the same start, and none is worse than the one without."""
    chooser, _, problem = case
    before = chooser.choose(problem)
    loss, rehearsed = chooser.loss(before), chooser.rehearsed(rehearsal, before)
    assert rehearsed < loss
    chosen = chooser.choose(problem, rehearsal)
    hidden = f"rehearsed: hidden {before.shape.hidden}, "
    assert capsys.readouterr().out.count(hidden) == 2
    assert problem.cost.of(chosen.shape) <= problem.budget.target
    assert chooser.rehearsed(rehearsal, chosen) <= rehearsed
    assert chooser.rehearsed(rehearsal, before) == rehearsed
    assert chooser.loss(before) == loss


def set_rates(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """Of tuning."""
    for name in ("MAP_LEARNING_RATE", "SCALE_LEARNING_RATE"):
        monkeypatch.setattr(f"llm_vtrans.masking.tuning.{name}", rate)


def test_heads_are_rehearsed_with_the_dimensions_that_a_plan_leaves_them(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of no length leave the network as it was measured."""
    set_rates(monkeypatch, 0.0)
    architecture, model = architecture_of("gpt2"), tiny_model("gpt2")
    batches = [{"input_ids": tokens(4)}]
    basis = balanced_basis(model, architecture, batches, lambda batch: model(**batch))
    distillation = SelfDistillation(MaskedModel(model, architecture, fresh("gpt2")))
    masks = VIBMasks(initial_shapes(architecture, ("hidden", "heads", "ffn"), True), 0.0, 0)
    chooser = Chooser(distillation, masks, batches, None, basis)
    plan = random_plan(architecture, True, 5, basis=basis)
    assert plan.head_dim is not None and plan.head_dim < basis.width
    plan = replace(plan, basis=None)  # as plans are compared
    assert math.isclose(chooser.rehearsed(rehearsal, plan), chooser.loss(plan), rel_tol=1e-4)


@pytest.mark.parametrize(("tune_steps", "most"), [(29, 0), (30, 0), (60, 2), (120, 4)])
def test_rehearsals_take_half_as_many_steps_as_tuning_at_most(
    case: tuple[Chooser, VIBMasks, Problem],
    rehearsal: Rehearsal,
    capsys: pytest.CaptureFixture[str],
    tune_steps: int,
    most: int,
) -> None:
    chooser, _, problem = case
    settings = replace(rehearsal.settings, tune_steps=tune_steps)
    chooser.choose(problem, replace(rehearsal, settings=settings))
    num = capsys.readouterr().out.count("rehearsed: ")
    assert num <= most and (num > 0) == (most > 1)


def test_a_rehearsal_that_fails_has_no_loss(
    case: tuple[Chooser, VIBMasks, Problem], rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rates(monkeypatch, float("inf"))
    chooser, _, problem = case
    before = chooser.choose(problem)
    assert math.isnan(chooser.rehearsed(rehearsal, before))
    assert chooser.choose(problem, rehearsal).shape == before.shape
