"""The dense network teaches the masked one: what every stage of training minimises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_vtrans.attachment import Gates, MaskedModel
from llm_vtrans.distillation_loss import chunked_distillation, distillation_loss
from llm_vtrans.tasks.encoding import Batch, inputs_of


def recompute(model: Any) -> None:
    """Makes a model of the library keep only each layer's input, in evaluation mode too."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it only recomputes then; dropout below stays off


class Distillation(nn.Module):
    """A student with its teacher.

    `forward(batch, gates)` runs both on one micro-batch and gives the terms, each of shape
    `()`, among them `loss`; the gates stay in force until the backward pass is over.

    Args:
        masked: the student, with gates and tuning.
        recomputes: keep only each layer's input and compute the rest again on the way back. The
            gates stay in force until then, so that both computations see the same draw.
    """

    def __init__(self, masked: MaskedModel, recomputes: bool = False):
        super().__init__()
        self.masked = masked
        if recomputes:
            recompute(masked.model)

    def teach(self, inputs: Batch) -> Tensor:
        """The teacher's outputs, which carry no gradient; no gates are in force afterwards."""
        raise NotImplementedError

    def loss(self, inputs: Batch, taught: Tensor) -> Tensor:
        """Mean KL per prediction in nats, shape `()`, under the gates in force.

        Args:
            inputs: what the model takes by name.
            taught: the teacher's outputs for them.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What both stages train, as `Tuning.parameter_groups`."""
        return []


class SelfDistillation(Distillation):
    """The weights are frozen, so the teacher is the same network with masks and tuning off."""

    @torch.no_grad()
    def teach(self, inputs: Batch) -> Tensor:
        """Hidden states before the head, or logits, see `_outputs`."""
        self.masked.set_gates(None)
        return self._outputs(inputs)

    def loss(self, inputs: Batch, taught: Tensor) -> Tensor:
        """Mean KL per prediction in nats, shape `()`, under the gates in force."""
        head, learnt = self.masked.head, self._outputs(inputs)
        if head is None:
            return distillation_loss(learnt, taught)
        return chunked_distillation(head, learnt, taught)

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """Terms of one micro-batch; labels are not used."""
        inputs = inputs_of(batch)
        taught = self.teach(inputs)
        self.masked.set_gates(gates)
        loss = self.loss(inputs, taught)
        return {"loss": loss, "distillation": loss}

    def _outputs(self, inputs: Batch) -> Tensor:
        """What the head reads where it is one matrix, else logits."""
        masked = self.masked
        return masked(inputs) if masked.head is None else masked.hidden_states(inputs)
