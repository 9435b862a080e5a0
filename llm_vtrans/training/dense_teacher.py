"""Distillation while the weights are trained: the dense network is a second, frozen model.

VTrans (arXiv:2406.05276) takes it from CoFi (arXiv:2204.00408, section 3.3): the teacher's
distribution at a temperature, its hidden states through a learned map, each matched to
the layer of the student that comes nearest, and the task's own loss where there are labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.families.base import Axis
from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.by_layer import Gates
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training.distillation import Distillation, with_sum
from llm_vtrans.training.distillation_loss import distillation_loss
from llm_vtrans.training.layer_matching import layer_distance, spaced, token_mask

MAP_LEARNING_RATE = 0.2  # of the layers' map, divided by its width
WEIGHT_DECAY = 0.01


class DenseTeacher(Distillation):
    """A student whose weights are trained, and the dense model that it came from.

    Args:
        masked: the student; its trained weights require gradients.
        teacher: frozen copy of the dense model, in the student's basis of the stream.
        learning_rate: largest one of the weights.
        temperature: of the distributions that are compared.
        dtype: to compute in; the weights are float32.
        recomputes: as `Distillation`.
    """

    def __init__(
        self,
        masked: MaskedModel,
        teacher: nn.Module,
        learning_rate: float,
        temperature: float,
        dtype: torch.dtype,
        recomputes: bool = False,
    ):
        super().__init__(masked, recomputes)
        self.teacher = teacher.requires_grad_(False)
        self.learning_rate, self.temperature, self.dtype = learning_rate, temperature, dtype
        size = masked.architecture.num_units[Axis.HIDDEN]
        has_inner = masked.architecture.num_layers > 1
        self.map = nn.Parameter(torch.eye(size), requires_grad=has_inner)

    @torch.no_grad()
    def teach(self, inputs: Batch) -> Tensor:
        """Logits of the dense model."""
        self.masked.set_gates(None)
        return logits_of(self.teacher(**inputs, use_cache=False))

    def loss(self, inputs: Batch, taught: Tensor) -> Tensor:
        """Mean KL per prediction in nats, shape `()`, under the gates in force."""
        return distillation_loss(self.masked(inputs), taught)

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """Terms of one micro-batch: `distillation` and `hidden`, and with labels `task`."""
        with torch.no_grad():
            taught = self.teacher(**inputs_of(batch), use_cache=False, output_hidden_states=True)
        self.masked.set_gates(gates)
        is_low = self.dtype is not torch.float32
        with torch.autocast(batch["input_ids"].device.type, self.dtype, enabled=is_low):
            learnt = self.masked.outputs(batch, output_hidden_states=True)
        terms = {
            "distillation": softened_loss(logits_of(learnt), logits_of(taught), self.temperature),
            "hidden": self.hidden_loss(
                inner_layers(learnt), inner_layers(taught), token_mask(batch)
            ),
        }
        if learnt.get("loss") is not None:
            terms["task"] = learnt["loss"].float()
        return with_sum(terms)

    def hidden_loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], is_token: Tensor | None
    ) -> Tensor:
        """`layer_distance` through the learned map, 0 if there are no layers; shape `()`.

        Args:
            student: streams behind the layers, `(batch, seq, hidden_size)` each; that may be
                fewer layers and dimensions than the teacher's.
            teacher: the same of the dense model.
            is_token: `(batch, seq)`, 0 at padding; None where there is none.
        """
        if not teacher or not student:
            return self.map.new_zeros(())
        whole = [self.masked.whole_stream(hidden) for hidden in student]
        return layer_distance(whole, spaced(teacher), is_token, self.map)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, which decay, and the layers' map."""
        weights = [p for p in self.masked.model.parameters() if p.requires_grad]
        rate = self.learning_rate
        groups = [{"params": weights, "peak": rate, "weight_decay": WEIGHT_DECAY}]
        if self.map.requires_grad:
            groups.append({"params": [self.map], "peak": MAP_LEARNING_RATE / len(self.map)})
        return groups


def softened_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`distillation_loss` at a temperature, times its square, which keeps the gradient's size.

    Hinton et al. (arXiv:1503.02531). Where the head gives one number there is no distribution
    to soften.
    """
    if student.shape[-1] == 1:
        return distillation_loss(student, teacher)
    student, teacher = student.float() / temperature, teacher.float() / temperature
    return temperature**2 * distillation_loss(student, teacher)


def inner_layers(output: Any) -> tuple[Tensor, ...]:
    """The stream behind every layer but the last.

    What the library gives last is behind the final norm in some families; there the logits
    say what it should be.
    """
    return tuple(output.hidden_states[1:-1])
