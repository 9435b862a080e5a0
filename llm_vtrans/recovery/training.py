"""The loop of all recoveries by distillation: the pruned network learns the dense one's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_vtrans.distributed.zero3 import attach
from llm_vtrans.loading.widened import widen_where_slow
from llm_vtrans.masking.attachment import logits_of
from llm_vtrans.tasks import training_order
from llm_vtrans.tasks.encoding import Batch, Examples, inputs_of
from llm_vtrans.training.distillation import recompute
from llm_vtrans.training.distillation_loss import distillation_loss
from llm_vtrans.training.loop import Objective, Progress, TrainingSettings, train, warm_up_and_decay
from llm_vtrans.training.preemption import Preemption

TOKENS = 2**20  # that a recovery sees by default, over all ranks
STEP_TOKENS = 2048  # in a step of a recovery outside the main job
DIVERGED = "continue with --resume and another --recover, or none"


def default_steps(batch_size: int, seq_len: int) -> int:
    """Steps that make up `TOKENS`.

    Args:
        batch_size: sequences in a step, over all ranks.
        seq_len: tokens in one.
    """
    return max(1, round(TOKENS / (batch_size * seq_len)))


@dataclass(frozen=True)
class RecoveryRun:
    """How a recovery trains.

    Attributes:
        accelerator: ranks and device.
        settings: of the loop; its `num_steps` are the recovery's.
        dtype: to compute in.
        recomputes: keep only each layer's input for the backward pass.
        report: called on every rank after each logged step.
        say: tells people a line.
        preemption: asked after each step whether to stop.
    """

    accelerator: Accelerator
    settings: TrainingSettings
    dtype: torch.dtype
    recomputes: bool
    report: Callable[[Progress], None]
    say: Callable[[str], None]
    preemption: Preemption

    @classmethod
    def alone(cls, seq_len: int, seed: int, num_steps: int | None = None) -> RecoveryRun:
        """On one device in float32, with the default number of steps, telling nothing."""
        batch_size = max(1, STEP_TOKENS // seq_len)
        steps = num_steps or default_steps(batch_size, seq_len)
        settings = TrainingSettings(
            search_steps=steps, tune_steps=0, batch_size=batch_size, gradient_accumulation=1,
            learning_rate=0.0, kl_weight=0.0, seed=seed, log_every=steps, save_every=steps,
            is_uniform=True,
        )  # fmt: skip
        return cls(
            Accelerator(), settings, torch.float32, False, lambda progress: None,
            lambda line: None, Preemption(),
        )  # fmt: skip


class Lesson(nn.Module):
    """Teacher and student on one batch; DeepSpeed gathers the layers of both while it runs."""

    def __init__(self, teacher: nn.Module, student: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.teacher, self.student, self.dtype = teacher, student, dtype

    def forward(self, batch: Batch) -> Tensor:
        """Mean KL per prediction in nats, shape `()`."""
        inputs = inputs_of(batch)
        device = batch["input_ids"].device.type
        # On a CPU products in half precision gain nothing.
        is_low = self.dtype is not torch.float32 and device != "cpu"
        with torch.autocast(device, self.dtype, enabled=is_low):
            with torch.no_grad():
                taught = logits_of(self.teacher(**inputs, use_cache=False))
            learnt = logits_of(self.student(**inputs, use_cache=False))
        return distillation_loss(learnt, taught)


class RecoverObjective(Objective):
    """Distillation from the dense network into the exported one.

    Args:
        lesson: both networks.
        trained: parameters of the student, or beside it, that learn.
        learning_rate: their largest one.
        num_steps: of the stage.
    """

    remedy = DIVERGED

    def __init__(
        self, lesson: Lesson, trained: Iterable[nn.Parameter], learning_rate: float, num_steps: int
    ):
        super().__init__()
        self.lesson, self.learning_rate = lesson, learning_rate
        self.trained = nn.ParameterList(trained)
        self.stage = range(num_steps)

    def forward(self, batch: Batch, micro_batch: int, step: int) -> dict[str, Tensor]:
        """The loss, which is the distillation's."""
        loss = self.lesson(batch)
        return {"loss": loss, "distillation": loss}

    def optimizer(self) -> torch.optim.AdamW:
        """Over the trained parameters, without decay: the teacher says where they should be."""
        groups: list[dict[str, Any]] = [{"params": list(self.trained), "peak": self.learning_rate}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Warms up, then decays linearly to zero."""
        warm_up_and_decay(self, optimizer, step)


def distil(
    teacher: nn.Module,
    student: nn.Module,
    trained: Iterable[nn.Parameter],
    learning_rate: float,
    examples: Examples,
    run: RecoveryRun,
) -> None:
    """Trains the student's parameters in place; every rank ends with the same ones.

    Args:
        teacher: the dense network.
        student: the pruned one.
        trained: what learns; the same values on every rank.
        learning_rate: its largest one.
        examples: to learn from, shuffled and repeated as often as the steps need.
        run: how.

    Raises:
        UserError: a loss or a weight became NaN or infinite.
        Preempted: a signal asked the run to go.
    """
    accelerator, settings = run.accelerator, run.settings
    teacher.requires_grad_(False).eval()
    student.eval()
    widen_where_slow(student, accelerator.device)
    if run.recomputes:
        recompute(student)
    lesson = Lesson(teacher, student, run.dtype)
    attach(accelerator, lesson)
    objective = RecoverObjective(lesson, trained, learning_rate, settings.num_steps)
    num_samples = settings.num_steps * settings.global_batch(accelerator.num_processes)
    order = training_order(len(examples), num_samples, 1.0, settings.seed)
    with run.preemption.deferred(accelerator):
        train(
            objective, objective.optimizer(), examples.take(order), accelerator, settings, 0,
            run.report, lambda step: None, run.preemption,
        )  # fmt: skip
    run.preemption.check()


def settings_of(settings: TrainingSettings, num_steps: int) -> TrainingSettings:
    """The main job's numbers for a recovery of so many steps."""
    return replace(settings, search_steps=num_steps, tune_steps=0, save_every=num_steps)
