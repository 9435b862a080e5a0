"""TUNE: the kept units are fixed; maps and factors adapt to them, without noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_vtrans.distillation import SelfDistillation
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training import Objective, TrainingSettings

WARMUP_SHARE = 0.05


class TuneObjective(Objective):
    """Distillation into the hard-masked network, of which the tuning is trained.

    Args:
        distillation: of the frozen model with gates and tuning.
        hard: gate values of the plan, as `set_gates` takes them.
        sparsity: of the plan, for the record.
        settings: of the loop.
    """

    def __init__(
        self,
        distillation: SelfDistillation,
        hard: Mapping[str, Tensor],
        sparsity: float,
        settings: TrainingSettings,
    ):
        super().__init__()
        self.distillation, self.masked = distillation, distillation.masked
        self.tuning, self.hard, self.sparsity = self.masked.tuning, hard, sparsity
        self.stage = range(settings.search_steps, settings.num_steps)

    def forward(self, batch: Batch, micro_batch: int, step: int) -> dict[str, Tensor]:
        """Loss terms, each of shape `()`; labels are not used."""
        loss = self.distillation(
            inputs_of(batch),
            lambda: self.masked.set_gates(None),
            lambda: self.masked.set_gates(self.hard),
        )
        sparsity = loss.new_tensor(self.sparsity)
        return {"loss": loss, "distillation": loss, "sparsity": sparsity, "target": sparsity}

    def optimizer(self) -> torch.optim.Adam:
        """Adam over maps and factors."""
        return torch.optim.Adam(self.tuning.parameter_groups())

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Warms up, then decays linearly to zero."""
        warmup = max(1.0, WARMUP_SHARE * len(self.stage))
        rise = min(1.0, (step - self.stage.start + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rise * (1 - self.progress(step))
