"""MEASURE: what the dense network, those between the stages and the written one score and take."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from llm_vtrans.tasks import Task
from llm_vtrans.tasks.encoding import inputs_of
from llm_vtrans.timing.latency import forward_ms
from llm_vtrans.timing.stopwatch import Stopwatch


class Measurements:
    """All that one run measures, by the name of the network it was measured on.

    Attributes:
        headline: headline score after every stage.
        scores: all scores of the dense and the written model.
        latency: milliseconds of a pass by what it was measured on.

    Args:
        task: with the held-out examples.
        accelerator: ranks and device; rank zero takes the times.
        batch_size: examples in a pass that is scored.
        timed_dtype: of networks that are timed; None for no times.
        stopwatch: times networks, where there is a budget of time.
    """

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        batch_size: int,
        timed_dtype: torch.dtype | None,
        stopwatch: Stopwatch | None,
    ):
        self._task, self._accelerator, self._batch_size = task, accelerator, batch_size
        self._timed_dtype, self._stopwatch = timed_dtype, stopwatch
        self.headline: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.latency: dict[str, dict[str, float]] = {}

    def score(self, name: str, model: Any) -> None:
        """Takes all scores; called on every rank that holds a part of the network."""
        self.scores[name] = self._task.evaluate(model, self._batch_size)
        self.headline[name] = self.scores[name][self._task.headline]

    def stage(self, name: str, model: Any) -> None:
        """Takes the headline score alone."""
        self.headline[name] = self._task.evaluate(model, self._batch_size)[self._task.headline]

    def time(self, name: str, model: PreTrainedModel) -> None:
        """Times a pass of one sequence, and of the budget's shape where there is one."""
        if not self._accelerator.is_main_process or model.dtype != self._timed_dtype:
            return
        example = self._task.heldout.take(torch.zeros(1, dtype=torch.long))
        (batch,) = example.batches(1, self._accelerator.device)
        self._keep(
            f"{batch['input_ids'].numel()} tokens", name, forward_ms(model, inputs_of(batch))
        )
        if self._stopwatch is not None:
            self._keep(str(self._stopwatch.timed), name, self._stopwatch.milliseconds(model))

    def compared_latency(self) -> dict[str, dict[str, float]]:
        """The times that were taken of the dense and of the written model."""
        return {what: t for what, t in self.latency.items() if {"dense", "pruned"} <= t.keys()}

    def _keep(self, what: str, name: str, milliseconds: float) -> None:
        self.latency.setdefault(f"ms for {what}", {})[name] = milliseconds
