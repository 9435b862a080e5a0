"""The dense network teaches the masked one: what every stage of training minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.by_layer import Gates
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training.distillation_loss import chunked_distillation, distillation_loss
from llm_vtrans.training.layer_matching import layer_distance, spaced, token_mask


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

    def teach(self, inputs: Batch) -> Any:
        """What the teacher says, without a gradient; no gates are in force afterwards."""
        raise NotImplementedError

    def loss(self, inputs: Batch, taught: Any) -> Tensor:
        """How far the student is from that, shape `()`, under the gates in force.

        Args:
            inputs: what the model takes by name.
            taught: by `teach`, for the same inputs.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What both stages train, as `Tuning.parameter_groups`."""
        return []


@dataclass(frozen=True)
class Taught:
    """What a frozen network says with masks and tuning off.

    Attributes:
        outputs: hidden states before the head of a language model, or logits.
        layers: of other models, the residual stream behind the layers to match.
    """

    outputs: Tensor
    layers: list[Tensor]


def with_sum(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms, each of shape `()`, and `loss`, their sum."""
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class SelfDistillation(Distillation):
    """The weights are frozen, so the teacher is the same network with masks and tuning off.

    A language model answers at every token. Other heads give a few numbers for a whole
    sequence, too few to tell what thousands of units do, so their students also follow the
    teacher's residual stream.
    """

    @torch.no_grad()
    def teach(self, inputs: Batch) -> Taught:
        """Outputs, and layers where they are matched."""
        with self.masked.unpruned():
            outputs, layers = self._run(inputs)
        return Taught(outputs, spaced(layers) if layers else [])

    def loss(self, inputs: Batch, taught: Taught) -> Tensor:
        """Sum of the terms that all plans have, shape `()`, under the gates in force."""
        matches = not self.masked.tuning.is_rotated  # with another basis there is none to match
        return with_sum(self._terms(inputs, taught, matches))["loss"]

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """Terms of one micro-batch: `distillation`, and `hidden` where layers are matched."""
        inputs = inputs_of(batch)
        taught = self.teach(inputs)
        self.masked.set_gates(gates)
        return with_sum(self._terms(inputs, taught, not self.masked.tuning.moves_stream))

    def _terms(self, inputs: Batch, taught: Taught, matches: bool) -> dict[str, Tensor]:
        """Mean KL per prediction in nats, and the mean distance of layers in the teacher's."""
        head, (learnt, layers) = self.masked.head, self._run(inputs)
        if head is not None:
            return {"distillation": chunked_distillation(head, learnt, taught.outputs)}
        terms = {"distillation": distillation_loss(learnt, taught.outputs)}
        if taught.layers and matches:
            terms["hidden"] = layer_distance(layers, taught.layers, token_mask(inputs))
        return terms

    def _run(self, inputs: Batch) -> tuple[Tensor, list[Tensor]]:
        """What the head reads where it is one matrix, else logits; and layers to match."""
        masked = self.masked
        if masked.head is not None:
            return masked.hidden_states(inputs), []
        matches = not masked.predicts_tokens
        output = masked.outputs(inputs, output_hidden_states=matches)
        return logits_of(output), list(output.hidden_states[1:]) if matches else []
