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

    def teach(self, inputs: Batch) -> Tensor:
        """The teacher's logits, which carry no gradient."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What both stages train, as `Tuning.parameter_groups`."""
        return []


class SelfDistillation(Distillation):
    """The weights are frozen, so the teacher is the same network with masks and tuning off."""

    @torch.no_grad()
    def teach(self, inputs: Batch) -> Tensor:
        """Logits without gates, which are off then."""
        self.masked.set_gates(None)
        logits: Tensor = self.masked(inputs)
        return logits

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """Terms of one micro-batch; labels are not used."""
        inputs = inputs_of(batch)
        teacher = self.teach(inputs)
        self.masked.set_gates(gates)
        loss = distillation_loss(self.masked(inputs), teacher)
        return {"loss": loss, "distillation": loss}
