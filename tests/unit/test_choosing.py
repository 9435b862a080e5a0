"""Plans are told apart by what their networks lose, at once or after some training."""

import torch

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.choosing import NUM_REHEARSED, Chooser
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.families import family_for
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.masks import VIBMasks
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.training.distillation import SelfDistillation
from llm_vtrans.training.search import initial_shapes
from tests.tiny import tiny_model
from tests.unit.test_exactness import inputs_for


def test_the_best_few_are_compared_again_after_a_rehearsal() -> None:
    model = tiny_model("llama")
    architecture = family_for("llama").describe(model.config)
    masked = MaskedModel(model, architecture, Tuning(architecture, is_rotated=False))
    masks = VIBMasks(initial_shapes(architecture, ("hidden", "heads", "ffn"), False), 0.0, 0)
    cost = parameter_cost(architecture)
    dense = cost.of(dense_shape(architecture))
    problem = Problem(architecture, cost, Budget("params", dense // 2, dense), 1, False)
    batches = [inputs_for(model.config, 0)]
    chooser = Chooser(SelfDistillation(masked), masks, batches, None, None)
    best = chooser.choose(problem)
    rehearsed: list[PrunePlan] = []
    told: list[float] = []

    @torch.no_grad()
    def rehearse(plan: PrunePlan, loss: float) -> None:
        """All but the third are spoilt by what they learn."""
        told.append(loss)
        assert all(bool((scale == 1).all()) for scale in masked.tuning.scales.values())
        rehearsed.append(plan)
        masked.tuning.is_on = True
        for scale in masked.tuning.scales.values():
            scale.fill_(1 if len(rehearsed) == 3 else 5)

    chosen = chooser.choose(problem, rehearse)
    losses = [chooser.loss(plan) for plan in rehearsed]
    assert told == losses == sorted(losses) and len(losses) == NUM_REHEARSED
    assert rehearsed[0].shape == best.shape
    assert chosen is rehearsed[2]
