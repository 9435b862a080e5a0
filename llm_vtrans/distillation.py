"""The dense network teaches the masked one: what every stage of training minimises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.attachment import Gates, MaskedModel
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training import distillation_loss


class Distillation(nn.Module):
    """A student with its teacher.

    `forward(batch, gates)` runs both on one micro-batch and gives the terms, each of shape
    `()`, among them `loss`; the gates stay in force until the backward pass is over.

    Args:
        masked: the student, with gates and tuning.
    """

    def __init__(self, masked: MaskedModel):
        super().__init__()
        self.masked = masked

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained in the student beside its gates, as `Tuning.parameter_groups`."""
        return self.masked.tuning.parameter_groups()


class SelfDistillation(Distillation):
    """The weights are frozen, so the teacher is the same network with masks and tuning off."""

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """Terms of one micro-batch; labels are not used."""
        inputs = inputs_of(batch)
        self.masked.set_gates(None)
        with torch.no_grad():
            teacher = self.masked(inputs)
        self.masked.set_gates(gates)
        loss = distillation_loss(self.masked(inputs), teacher)
        return {"loss": loss, "distillation": loss}
