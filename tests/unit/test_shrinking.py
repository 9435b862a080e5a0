"""A network from which units went computes what the whole one does without them, and trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_vtrans.allocation.allocate import allocate
from llm_vtrans.basis.rotation import rotated_architecture
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.families import Axis
from llm_vtrans.families.base import UNIT_AXES, UNIT_AXIS, Norm
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.by_layer import presence
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.training.search import initial_shapes
from llm_vtrans.training.shrinking import NEVER, Shrinker
from llm_vtrans.training.trained_weights import train_weights
from tests.tiny import CONFIGS, save_tiny
from tests.unit.test_exactness import TOLERANCE, inputs_for, relative

LOST = 9.0  # `log_var` of a unit that is given up


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("dense"))


class Case:
    """A network whose weights are trained, masks that give up some of each structure."""

    def __init__(self, folder: Path, sparsity: float = 0.5):
        self.source = open_source(str(folder))
        table = self.source.architecture
        self.rotates = table.rotates and table.norm is Norm.RMS
        self.architecture = rotated_architecture(table) if self.rotates else table
        cost = parameter_cost(self.architecture)
        dense = cost.of(dense_shape(self.architecture))
        budget = Budget("params", int((1 - sparsity) * dense), dense)
        self.problem = Problem(self.architecture, cost, budget, 1, False)
        model = load_model(self.source, torch.float32, torch.device("cpu"), self.architecture)
        self.model = model
        self.masked = MaskedModel(model, self.architecture)
        train_weights(model, self.architecture, self.rotates)
        shapes = initial_shapes(self.architecture, ("hidden", "heads", "ffn", "layers"), False)
        self.masks = VIBMasks(shapes, -4.0, 0)
        with torch.no_grad():
            for mask in (self.masks.log_var[axis.value] for axis in UNIT_AXES):
                mask[..., 1::3] = LOST
            self.masks.log_var["layers"][1, 1] = LOST
        self.shrinker = Shrinker(self.masked, self.source, self.problem, 2)
        self.inputs = inputs_for(self.source.config, 0)

    def gates(self) -> dict[str, Tensor]:
        """Zero for what is given up."""
        probable = self.masks.keep_probability(10.0)
        keep = {name: (p > 0.5).float() for name, p in probable.items()}
        return {**{n: k * 0.9 for n, k in keep.items()}, **presence(keep, 3)}

    def outputs(self) -> Any:
        self.masked.set_gates(self.gates())
        return self.masked.model(**self.inputs, output_hidden_states=True)

    def optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.masked.model.parameters() if p.requires_grad]
        masks = list(self.masks.parameters())
        return torch.optim.AdamW([{"params": masks}, {"params": weights}], lr=1e-3)

    def train(self, optimizer: torch.optim.Optimizer) -> float:
        loss = logits_of(self.outputs()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())


def test_the_function_stays(folder: Path) -> None:
    case = Case(folder)
    before = case.outputs()
    case.shrinker.step(2, case.masks, case.optimizer())
    assert case.masked.model is not case.model and case.shrinker.removed > 0.2
    after = case.outputs()
    assert relative(logits_of(after), logits_of(before)) < TOLERANCE
    streams = [case.masked.whole_stream(hidden) for hidden in after.hidden_states]
    assert streams[0].shape == before.hidden_states[0].shape
    torch.testing.assert_close(streams[1], before.hidden_states[1], rtol=1e-4, atol=1e-5)


def test_training_goes_on_as_in_the_whole_network(folder: Path) -> None:
    """The next step's loss is the same, and later ones fall."""
    losses = []
    for shrinks in (False, True):
        case = Case(folder)
        optimizer = case.optimizer()
        first = [case.train(optimizer) for _ in range(2)]
        if shrinks:
            case.shrinker.step(2, case.masks, optimizer)
            assert all(len(p) for p in case.masked.model.parameters())
            held = {p for group in optimizer.param_groups for p in group["params"]}
            assert {p for p in case.masked.model.parameters() if p.requires_grad} <= held
            assert optimizer.state.keys() <= held
        losses.append([*first, case.train(optimizer), case.train(optimizer)])
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-4)
    assert losses[1][3] < losses[1][2]


def test_it_becomes_whole_again(folder: Path) -> None:
    case = Case(folder)
    dense = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    before = case.outputs()
    case.shrinker.step(2, case.masks, case.optimizer())
    alive = case.shrinker.alive
    assert alive is not None
    case.shrinker.expand()
    assert case.masked.model is case.model and case.shrinker.removed == 0
    assert relative(logits_of(case.outputs()), logits_of(before)) < TOLERANCE
    for name, (spec, layer) in case.architecture.named_tensors().items():
        whole, expected = case.model.get_parameter(name), dense[name]
        if spec.sublayer is not None:
            expected = expected * alive[UNIT_AXIS[spec.sublayer]][layer].any()
        for index, dim in enumerate(spec.dims):
            if dim.axis is None:
                continue
            keep = alive[dim.axis] if dim.axis is Axis.HIDDEN else alive[dim.axis][layer]
            units = keep.repeat_interleave(case.architecture.units_per(dim)).repeat(dim.num_blocks)
            shape = [-1 if i == index else 1 for i in range(whole.dim())]
            expected = expected * units.view(shape)
        torch.testing.assert_close(whole.detach(), expected)


def test_what_went_does_not_come_back(folder: Path) -> None:
    case = Case(folder)
    optimizer = case.optimizer()
    case.shrinker.step(1, case.masks, optimizer)
    assert case.shrinker.alive is None  # not yet due
    case.shrinker.step(2, case.masks, optimizer)
    first = case.shrinker.alive
    assert first is not None
    for axis in UNIT_AXES:
        assert bool((case.masks.log_var[axis.value][~first[axis]] == NEVER).all())
    with torch.no_grad():
        case.masks.log_var["ffn"][:, 2::3] = LOST
        case.masks.log_var["ffn"][:, 1::3] = -4.0  # even so
    case.shrinker.step(4, case.masks, optimizer)
    second = case.shrinker.alive
    assert second is not None and second["ffn"].sum() < first["ffn"].sum()
    assert all(bool((second[axis] <= first[axis]).all()) for axis in UNIT_AXES)
    saved, resumed = case.shrinker.state(), Case(folder)
    resumed.shrinker.recall(saved)
    shapes = [p.shape for p in case.masked.model.parameters()]
    assert [p.shape for p in resumed.masked.model.parameters()] == shapes


def test_the_budget_stays_within_reach(folder: Path) -> None:
    """Masks that give up too much leave the plan that meets the budget alone."""
    case = Case(folder, sparsity=0.1)
    with torch.no_grad():
        for mask in case.masks.log_var.values():
            mask += LOST * torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    plan = allocate(case.masks, case.problem)
    case.shrinker.step(2, case.masks, case.optimizer())
    assert case.shrinker.removed <= case.problem.sparsity(plan.shape) + 1e-9
