"""Budgets of time: the table knows what was measured, and the chosen shape keeps the budget."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import sin
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_vtrans.allocation.allocate import PrunePlan, allocate
from llm_vtrans.allocation.candidates import Candidates, Fit
from llm_vtrans.arguments import PruneArguments
from llm_vtrans.budget.cost import Budget, complete, dense_shape
from llm_vtrans.budget.problem import Problem, check_reachable
from llm_vtrans.errors import UserError
from llm_vtrans.families import Axis, Shape
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.preparation.planning import make_problem, make_stopwatch
from llm_vtrans.timing import latency, remembered
from llm_vtrans.timing.latency import Pass
from llm_vtrans.timing.latency_cost import LatencyCost, Measure, latency_cost, table_sizes
from llm_vtrans.timing.rounding import MULTIPLES, best_multiple
from llm_vtrans.timing.timed_choice import AIM, choose_in_time
from tests.tiny import save_tiny
from tests.unit.test_allocation import (
    ALL,
    ARCHITECTURE,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    random_masks,
    seeds,
)

CPU = torch.device("cpu")
SIZES = table_sizes(HIDDEN, 1)


def device(shape: Shape) -> float:
    """Nanoseconds on a device that keeps to the table's rules."""
    width = shape.hidden
    layers = sum(
        (900 + 4 * width + heads * (70 + 9 * width) if heads else 0)
        + (500 + 3 * width + ffn * (2 + width) if ffn else 0)
        for heads, ffn in zip(shape.heads, shape.ffn, strict=True)
    )
    return 4000 + 30 * width + layers


def stepped(shape: Shape) -> float:
    """One that does not: work comes in blocks, and narrow layers waste more."""
    blocks = sum(-(-n // 32) * 32 for n in shape.ffn)
    return 1.3 * device(shape) + 40 * blocks + 2e5 / shape.hidden


def odd(shape: Shape) -> float:
    """One on which a table that is right for a hidden size is wrong for the next one."""
    return (1.25 if shape.hidden % 2 else 1.0) * device(shape)


def idle(shape: Shape, width: float) -> float:
    """One on which little depends on dimensions, and FFN units are all but free."""
    layers = sum(
        (900 + width * shape.hidden + 70 * heads if heads else 0)
        + (500 + width * shape.hidden + 0.2 * ffn if ffn else 0)
        for heads, ffn in zip(shape.heads, shape.ffn, strict=True)
    )
    return 400 + 3 * shape.hidden + layers


flat, steep = partial(idle, width=1), partial(idle, width=4)


def refit(masks: VIBMasks, fits: Sequence[Fit], known: Sequence[Shape]) -> PrunePlan | None:
    plans = (plan for fit in fits for plan in Candidates(masks, fit.problem).fitted(fit))
    return next((plan for plan in plans if plan.shape not in known), None)


def _has_whole_layers(shape: Shape) -> bool:
    """No larger plan has these layers."""
    units = {HEADS: shape.heads, FFN: shape.ffn}
    return shape.hidden == HIDDEN and all({*found} <= {0, n} for n, found in units.items())


def problem_of(share: float, is_uniform: bool, sizes: list[int]) -> Problem:
    cost = latency_cost(ARCHITECTURE, sizes, device)
    dense = cost.of(dense_shape(ARCHITECTURE))
    return Problem(ARCHITECTURE, cost, Budget("ns", int(share * dense), dense), 1, is_uniform)


@settings(deadline=None)
@given(
    hidden=st.integers(SIZES[0] // 2, HIDDEN),
    heads=st.lists(st.integers(0, HEADS), min_size=LAYERS, max_size=LAYERS),
    ffn=st.lists(st.integers(0, FFN), min_size=LAYERS, max_size=LAYERS),
)
def test_the_table_knows_every_shape(hidden: int, heads: list[int], ffn: list[int]) -> None:
    shape = Shape(hidden, tuple(heads), tuple(ffn))
    cost = latency_cost(ARCHITECTURE, SIZES, device)
    assert cost.of(shape) == pytest.approx(device(shape), rel=1e-6, abs=2 * LAYERS + 1)
    assert sum(cost.split(shape).values()) == cost.of(shape)


def test_a_table_of_one_size_is_constant_in_it() -> None:
    cost = latency_cost(ARCHITECTURE, [HIDDEN], device)
    dense = dense_shape(ARCHITECTURE)
    assert cost.of(dense) == pytest.approx(device(dense), rel=1e-6)
    assert cost.outside(10) == cost.outside(HIDDEN)


def test_the_expectation_has_a_gradient_and_ends_at_the_shape() -> None:
    cost = latency_cost(ARCHITECTURE, SIZES, device)
    keep = {
        name: torch.ones(shape, requires_grad=True)
        for name, shape in ((Axis.HIDDEN, HIDDEN), (Axis.FFN, (LAYERS, FFN)))
    }
    expected = cost.expected(complete({n.value: k for n, k in keep.items()}, ARCHITECTURE))
    assert float(expected.detach()) == pytest.approx(cost.of(dense_shape(ARCHITECTURE)), rel=1e-5)
    for gradient in torch.autograd.grad(expected, list(keep.values())):
        assert bool((gradient > 0).all())


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize(
    ("sizes", "structures"), [(SIZES, ALL), ([HIDDEN], ALL), ([HIDDEN], ("heads", "ffn"))]
)
@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.4, 0.9), seed=seeds)
def test_a_plan_keeps_to_the_table(
    is_uniform: bool, sizes: list[int], structures: tuple[str, ...], share: float, seed: int
) -> None:
    problem = problem_of(share, is_uniform, sizes)
    shape = allocate(random_masks(structures, is_uniform, seed), problem).shape
    assert 0.99 < problem.used(shape) <= 1


@pytest.mark.parametrize(
    ("rule", "measure"), [(stepped, stepped), (odd, odd), (steep, flat), (flat, steep)]
)
@pytest.mark.parametrize("is_uniform", [True, False])
@settings(deadline=None, max_examples=10)
@given(share=st.floats(0.4, 0.8), seed=seeds)
@example(share=0.5127193238138174, seed=4294967295)
@example(share=0.442639457944882, seed=0)
def test_the_chosen_shape_keeps_the_time_that_it_takes(
    is_uniform: bool, rule: Measure, measure: Measure, share: float, seed: int
) -> None:
    """On a device that does not keep to the table; what it took is what the problem then says."""
    dense = latency_cost(ARCHITECTURE, SIZES, rule)
    allowed = share * dense.of(dense_shape(ARCHITECTURE))
    budget = Budget("ns", int(AIM * allowed), dense.of(dense_shape(ARCHITECTURE)))
    masks = random_masks(ALL, is_uniform, seed)
    problem = Problem(ARCHITECTURE, dense, budget, 1, is_uniform)
    best = partial(allocate, masks)
    said: list[str] = []
    plan, problem = choose_in_time(problem, best, best, partial(refit, masks), measure, said.append)
    assert any(line.startswith(f"timed: {plan.shape}  ") for line in said)
    assert measure(plan.shape) <= 1.005 * allowed
    assert measure(plan.shape) > 0.96 * allowed or _has_whole_layers(plan.shape)
    assert problem.cost.of(plan.shape) == pytest.approx(measure(plan.shape), rel=1e-3)


def test_a_table_is_right_for_two_networks() -> None:
    """Of which it was wrong in what it adds and in what it multiplies."""
    cost = latency_cost(ARCHITECTURE, SIZES, steep)
    shapes = [Shape(hidden, (4,) * LAYERS, (ffn,) * LAYERS) for hidden, ffn in ((30, 90), (50, 99))]
    corrected = cost.through(*((shape, flat(shape)) for shape in shapes))
    for shape in shapes:
        assert corrected.of(shape) == pytest.approx(flat(shape), rel=1e-3)
    between = Shape(40, (4,) * LAYERS, (95,) * LAYERS)
    assert corrected.of(between) == pytest.approx(flat(between), rel=1e-3)
    again = corrected.corrected(shapes[0], 7000.0)
    assert again.of(shapes[0]) == pytest.approx(7000, rel=1e-3)


def test_two_networks_that_are_nearly_the_same_tell_no_slope() -> None:
    cost = latency_cost(ARCHITECTURE, SIZES, device)
    one, other = (Shape(50, (4,) * LAYERS, (ffn,) * LAYERS) for ffn in (100, 101))
    found = device(other)
    corrected = cost.through((one, 1.1 * found), (other, found))
    assert corrected == cost.corrected(other, found)
    assert cost.through((other, found), (other, found)) == corrected


@pytest.mark.parametrize("is_uniform", [True, False])
@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.5, 0.8), other=st.floats(0.9, 1.1), seed=seeds)
def test_a_plan_is_fitted_to_another_budget(
    is_uniform: bool, share: float, other: float, seed: int
) -> None:
    masks = random_masks(ALL, is_uniform, seed)
    problem = problem_of(share, is_uniform, SIZES)
    plan = allocate(masks, problem)
    budget = replace(problem.budget, target=int(other * problem.budget.target))
    fit = Fit(plan, replace(problem, budget=budget), plan.shape.hidden, max(plan.shape.heads))
    fitted = refit(masks, [fit], [])
    assert fitted is not None
    assert fitted.present.equal(plan.present)
    assert is_uniform <= (fitted.shape.heads == plan.shape.heads)
    used = problem.cost.of(fitted.shape) / budget.target
    is_whole = fitted.shape.hidden == HIDDEN and max(fitted.shape.ffn) == FFN
    assert used <= 1 and (used > 0.99 or is_whole)
    if other == 1:
        assert fitted.shape == plan.shape


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Pass(False, 1, 12)),
        ("prefill:4x7", Pass(False, 4, 7)),
        ("decode:3", Pass(True, 3, 12)),
    ],
)
def test_what_is_timed(text: str | None, expected: Pass) -> None:
    assert Pass.parse(text, 12) == expected


class _Uneven:
    """A machine that is fast at some times and slow at others, and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def run(self, work: float) -> None:
        self.now += work * (1.5 + sin(self.now / 9))


class _Work(Pass):
    """A pass of a number, which is the work it takes."""

    machine: ClassVar[_Uneven]

    def work(self, model: torch.Tensor) -> Callable[[], None]:
        return lambda: self.machine.run(float(model))


def test_a_pass_takes_the_same_beside_another_whatever_the_machine_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Work, "machine", _Uneven(monkeypatch), raising=False)
    monkeypatch.setattr(latency, "MAX_BLOCKS_SECONDS", 1e9)
    timed, one, other = _Work(False, 1, 1), torch.tensor(0.03), torch.tensor(0.02)
    alone = [latency.median_ms(timed.work(one), False) for _ in range(99)]
    beside = [timed.relative(one, other, 0.004) for _ in range(9)]
    assert max(alone) / min(alone) > 1.5
    assert beside == pytest.approx([1.5] * 9, rel=0.01)


@pytest.fixture
def few_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where networks are timed, but nothing depends on how long they take."""
    monkeypatch.setattr(remembered, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(latency, "BLOCK_SIZE", 1)
    monkeypatch.setattr(latency, "MIN_BLOCKS", 2)
    monkeypatch.setattr(latency, "MAX_BLOCKS_SECONDS", 0.0)


@pytest.mark.parametrize("text", ["prefill", "prefill:0x5", "decode:1x5", "decode:0", "x:1"])
def test_bad_passes(text: str) -> None:
    with pytest.raises(UserError, match="expected prefill:BxS or decode:B"):
        PruneArguments(latency_ms=1.0, latency_shape=text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency_shape": "decode:1"}, "belongs to --latency-ms"),
        ({"latency_ms": 0.0}, "must be positive"),
        ({"latency_ms": 1e9}, "the model takes"),
        ({"latency_ms": 1.0, "latency_shape": "prefill:1x9999"}, "context is"),
        ({"latency_ms": 1e-9, "layout": "per-layer"}, "raise --latency-ms"),
    ],
)
@pytest.mark.usefixtures("few_passes")
def test_bad_budgets(given: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        args = PruneArguments(model=str(save_tiny("llama", tmp_path)), seq_len=8, **given)
        source = open_source(args.model)
        stopwatch = make_stopwatch(args, source, CPU)
        check_reachable(make_problem(args, source, CPU, stopwatch), frozenset(args.structures()))


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma", "gpt2", "bert-mlm", "roberta-classify"]
)
@pytest.mark.parametrize("timed", ["prefill:2x8", "decode:2"])
@pytest.mark.usefixtures("few_passes")
def test_networks_of_every_family_are_timed(name: str, timed: str, tmp_path: Path) -> None:
    """The table is kept: a second look finds the same without measuring."""
    args = PruneArguments(
        model=str(save_tiny(name, tmp_path / "model")), seq_len=8, latency_ms=1.0,
        latency_shape=timed,
    )  # fmt: skip
    source = open_source(args.model)
    if timed.startswith("decode") and "-" in name:
        with pytest.raises(UserError, match="does not generate"):
            make_stopwatch(args, source, CPU)
        return
    stopwatch = make_stopwatch(args, source, CPU)
    assert stopwatch is not None
    size = source.architecture.num_units[Axis.HIDDEN]
    sizes = [size // 2, size]
    table = stopwatch.table(sizes)
    assert isinstance(table, LatencyCost) and table.sizes == tuple(sizes)
    assert 0 < table.outside(sizes[0]) < table.of(dense_shape(source.architecture))
    assert stopwatch.table(sizes) == table
    (kept,) = (tmp_path / "cache" / "latency").iterdir()
    kept.write_text(kept.read_text()[:-9])  # half written by something else
    assert stopwatch.table(sizes).sizes == tuple(sizes)
    assert json.loads(kept.read_text())["sizes"] == sizes


def test_the_best_multiple_is_one_that_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "CACHE", tmp_path)
    found = best_multiple(CPU, torch.float32)
    assert found in MULTIPLES and best_multiple(CPU, torch.float32) == found
    (kept,) = (tmp_path / "multiple").iterdir()
    kept.write_text("3")
    assert best_multiple(CPU, torch.float32) == 3
