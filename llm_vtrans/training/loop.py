"""The training loop that both stages share, on `accelerate`.

Noise and data order are functions of the seed and the global micro-batch number alone,
so a run is the same on one rank or several and continues bit for bit after a kill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm_vtrans.errors import UserError
from llm_vtrans.tasks.encoding import Batch, Examples, collate
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.save_pace import SavePace

WARMUP_SHARE = 0.05  # of a stage whose weights are not fresh
BUCKET = 2**24  # gradients averaged over the ranks at a time
UNSTABLE = "start again with --overwrite and a lower --learning-rate (the last saved state stays)"


@dataclass(frozen=True)
class TrainingSettings:
    """Numbers of the training loop.

    Attributes:
        search_steps: optimizer steps that train the masks.
        tune_steps: steps after them, with the kept units fixed.
        batch_size: windows per rank and micro-batch.
        gradient_accumulation: micro-batches per step and rank.
        learning_rate: of the masks, decaying linearly to zero.
        kl_weight: of the masks' KL terms.
        seed: of noise and masks.
        log_every: steps between two metric records.
        save_every: steps between two saved states, 0 as `SavePace` says.
        is_uniform: stock layout: every layer keeps the same counts.
        schedule: of the sparsity aimed at, `linear` or `cubic`.
    """

    search_steps: int
    tune_steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    kl_weight: float
    seed: int
    log_every: int
    save_every: int
    is_uniform: bool
    schedule: str = "linear"

    @property
    def num_steps(self) -> int:
        """Steps of both stages."""
        return self.search_steps + self.tune_steps

    def global_batch(self, num_ranks: int) -> int:
        """Sequences in an optimizer step, over all ranks."""
        return self.batch_size * self.gradient_accumulation * num_ranks


class Objective(nn.Module):
    """One stage of training: its loss, and what it trains.

    `stage` is the range of global steps that the stage covers. `forward(batch,
    micro_batch, step)` gives the terms of one micro-batch, each of shape `()`, among
    them `loss`. `remedy` is what to do where a term is no longer finite.
    """

    stage: range
    remedy = UNSTABLE

    def progress(self, step: int) -> float:
        """Share of the stage that is done before a global step, in [0, 1)."""
        return (step - self.stage.start) / len(self.stage)

    def record(self) -> dict[str, Tensor]:
        """What a resumed stage must know beside its parameters and their optimizer."""
        return {}

    def optimizer(self) -> torch.optim.Optimizer:
        """Fresh optimizer over the stage's parameters."""
        raise NotImplementedError

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets the learning rates of a global step."""
        raise NotImplementedError


@dataclass
class Progress:
    """What a logged step reports; the fields are the columns of metrics.jsonl.

    Attributes:
        step: optimizer steps done.
        metrics: loss terms in nats, sparsities, multipliers.
        tokens_per_second: over all ranks since the last report.
        eta_seconds: at that rate.
    """

    step: int
    metrics: dict[str, float]
    tokens_per_second: float
    eta_seconds: float


def train(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    accelerator: Accelerator,
    settings: TrainingSettings,
    first_step: int,
    report: Callable[[Progress], None],
    save: Callable[[int], None],
    preemption: Preemption,
) -> None:
    """Runs one stage; its parameters change in place.

    Args:
        objective: loss of the stage.
        optimizer: from the objective, with its state if the run is resumed.
        examples: of the whole run, in the order in which they are used.
        accelerator: ranks and device.
        settings: of the loop.
        first_step: global steps that are done already.
        report: called on every rank after each logged step.
        save: called on every rank when a state is due, and at the end of the stage.
        preemption: asked after each step whether to stop; the state is saved then.

    Raises:
        UserError: a loss term became NaN or infinite; the last saved state stays.
    """
    loader: DataLoader[Batch] = DataLoader(
        examples,  # type: ignore[arg-type]  # it has the two methods of a Dataset
        batch_size=settings.batch_size,
        drop_last=True,
        collate_fn=collate,
    )
    loader = accelerator.prepare_data_loader(loader)
    done = first_step * settings.gradient_accumulation
    batches: Iterator[Batch] = iter(accelerator.skip_first_batches(loader, done))
    num_tokens = tokens_per_step(settings, accelerator, examples)
    meter = _Meter(settings.num_steps, num_tokens, first_step)
    pace = SavePace(settings.save_every)
    for step in range(first_step, objective.stage.stop):
        objective.schedule(optimizer, step)
        for part in range(settings.gradient_accumulation):
            local = step * settings.gradient_accumulation + part
            number = local * accelerator.num_processes + accelerator.process_index
            terms = objective(next(batches), number, step)
            (terms["loss"] / settings.gradient_accumulation).backward()
        _average_gradients(objective, accelerator)
        optimizer.step()
        optimizer.zero_grad()
        num_done = step + 1
        is_last = num_done == objective.stage.stop
        if num_done % settings.log_every == 0 or is_last:
            report(meter.read(num_done, _collect(terms, accelerator, num_done, objective.remedy)))
        is_stopped = preemption.agreed(accelerator)
        if pace.is_due(num_done) or is_last or is_stopped:
            _check_finite(objective, num_done)
            pace.save(partial(save, num_done))
        if is_stopped:
            return


def tokens_per_step(
    settings: TrainingSettings, accelerator: Accelerator, examples: Examples
) -> int:
    """Of an optimizer step, over all ranks; padding included."""
    return settings.global_batch(accelerator.num_processes) * examples.num_tokens


def warm_up_and_decay(objective: Objective, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets every rate to its group's `peak`, reached after `WARMUP_SHARE`, then down to zero."""
    warmup = max(1.0, WARMUP_SHARE * len(objective.stage))
    rise = min(1.0, (step - objective.stage.start + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rise * (1 - objective.progress(step))


def _average_gradients(objective: nn.Module, accelerator: Accelerator) -> None:
    """A collective for many gradients at a time: masks are small and replicated on every rank."""
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    while grads:
        num = max(1, sum(size <= BUCKET for size in accumulate(g.numel() for g in grads)))
        bucket, grads = grads[:num], grads[num:]
        mean: Any = accelerator.reduce(torch.cat([grad.flatten() for grad in bucket]), "mean")
        for grad, part in zip(bucket, mean.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


class _Meter:
    """Rate of training since the last reading."""

    def __init__(self, num_steps: int, tokens_per_step: int, first_step: int):
        self._num_steps, self._tokens_per_step = num_steps, tokens_per_step
        self._step, self._clock = first_step, time.perf_counter()

    def read(self, step: int, metrics: dict[str, float]) -> Progress:
        """Metrics of a step with tokens per second and the time that is left."""
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._clock)
        self._step, self._clock = step, now
        eta = (self._num_steps - step) / rate
        return Progress(step, metrics, rate * self._tokens_per_step, eta)


def _collect(
    terms: dict[str, Tensor], accelerator: Accelerator, step: int, remedy: str
) -> dict[str, float]:
    names = list(terms)
    values: Any = accelerator.reduce(torch.stack([terms[n].detach() for n in names]), "mean")
    metrics = dict(zip(names, values.tolist(), strict=True))
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"step {step}: {name} is {value}; {remedy}")
    return metrics


def _check_finite(objective: Objective, step: int) -> None:
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"step {step}: {name} became NaN or infinite; {objective.remedy}")
