"""TUNE: the kept units are fixed; the rest of the network adapts to them, without noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_vtrans.tasks.encoding import Batch
from llm_vtrans.training.distillation import Distillation
from llm_vtrans.training.loop import Objective, TrainingSettings, warm_up_and_decay
from llm_vtrans.training.orthogonal import OrthogonalAdamW


class TuneObjective(Objective):
    """Distillation into the hard-masked network.

    Args:
        distillation: masked model and teacher.
        hard: gate values of the plan, as `set_gates` takes them.
        loss: of the network that they make, in nats, before anything is trained.
        num_tokens: of an optimizer step, over all ranks.
        sparsity: of the plan, for the record.
        settings: of the loop.
    """

    def __init__(
        self,
        distillation: Distillation,
        hard: Mapping[str, Tensor],
        loss: float,
        num_tokens: int,
        sparsity: float,
        settings: TrainingSettings,
    ):
        super().__init__()
        self.distillation, self.masked = distillation, distillation.masked
        self.tuning, self.hard = self.masked.tuning, hard
        self.loss, self.num_tokens, self.sparsity = loss, num_tokens, sparsity
        self.tuning.requires_grad_(True)
        self.tuning.is_on = True
        self.stage = range(settings.search_steps, settings.num_steps)

    def forward(self, batch: Batch, micro_batch: int, step: int) -> dict[str, Tensor]:
        """Loss terms, each of shape `()`."""
        terms = self.distillation(batch, self.hard)
        sparsity = terms["loss"].new_full((), self.sparsity)
        return {**terms, "sparsity": sparsity, "target": sparsity}

    def optimizer(self) -> OrthogonalAdamW:
        """Over all that is trained in the student."""
        tuned = self.tuning.parameter_groups(self.loss, self.num_tokens)
        return OrthogonalAdamW([*tuned, *self.distillation.parameter_groups()])

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Warms up, then decays linearly to zero."""
        warm_up_and_decay(self, optimizer, step)
