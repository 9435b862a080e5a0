"""TRAIN: mask-only finetuning (Faster-VTrans) on `accelerate`.

The weights are frozen; the teacher is the same network with its masks off. Noise and
data order are functions of the seed and the global micro-batch number alone, so a
run is the same on one rank or several and continues bit for bit after a kill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm_vtrans.budget import Budget, Cost, Lagrangian, complete
from llm_vtrans.distillation import SelfDistillation
from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Architecture, Axis
from llm_vtrans.masks import VIBMasks, keep_probability
from llm_vtrans.preemption import Preemption

SHARPNESS = (0.5, 10.0)  # of the keep probability, annealed geometrically over training
INITIAL_LOG_VAR = -4.0  # where that surrogate has a gradient from the first step on
MULTIPLIER_LEARNING_RATE = 0.1
UNSTABLE = "start again with --overwrite and a lower --learning-rate (the last saved state stays)"


@dataclass(frozen=True)
class TrainingSettings:
    """Numbers of the training loop.

    Attributes:
        num_steps: optimizer steps.
        batch_size: windows per rank and micro-batch.
        gradient_accumulation: micro-batches per step and rank.
        learning_rate: of the masks, decaying linearly to zero.
        kl_weight: of the masks' KL terms.
        seed: of noise and masks.
        log_every: steps between two metric records.
        save_every: steps between two saved states.
        is_uniform: stock layout: every layer keeps the same counts.
    """

    num_steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    kl_weight: float
    seed: int
    log_every: int
    save_every: int
    is_uniform: bool


class MaskObjective(nn.Module):
    """Loss of one micro-batch: distillation, KL of the masks, penalty of the budget.

    Args:
        distillation: frozen model with hooks, teacher and student at once.
        masks: the trained gates.
        cost: what the budget counts.
        budget: the target.
        settings: of the loop.
    """

    def __init__(
        self,
        distillation: SelfDistillation,
        masks: VIBMasks,
        cost: Cost,
        budget: Budget,
        settings: TrainingSettings,
    ):
        super().__init__()
        self.distillation, self.masked = distillation, distillation.masked
        self.masks = masks
        self.cost, self.budget, self.settings = cost, budget, settings
        self.lagrangian = Lagrangian()

    def forward(
        self, input_ids: Tensor, micro_batch: int, progress: float, target: float
    ) -> dict[str, Tensor]:
        """Loss terms, each of shape `()`.

        Args:
            input_ids: tokens `(batch, seq)`.
            micro_batch: global number of this micro-batch; with the seed it decides the noise.
            progress: share of training done, in [0, 1).
            target: sparsity aimed at in this step.
        """
        architecture = self.masked.architecture
        generator = torch.Generator(input_ids.device)
        generator.manual_seed(self.settings.seed * 1_000_003 + micro_batch)
        gates = complete_layers(self.masks.sample(generator), architecture)
        distillation = self.distillation(
            input_ids, lambda: self.masked.set_gates(None), lambda: self.masked.set_gates(gates)
        )
        sparsity = self.expected_sparsity(self.masks.keep_probability(sharpness_at(progress)))
        penalty = self.lagrangian(sparsity - target)
        kl = self.masks.kl(dict.fromkeys(self.masks.names(), 1.0))
        loss = distillation + self.settings.kl_weight * kl + penalty
        return {
            "loss": loss,
            "distillation": distillation,
            "kl": kl,
            "penalty": penalty,
            "sparsity": sparsity,
        }

    def expected_sparsity(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Share of the dense cost that goes if units stay with these probabilities, shape `()`."""
        full = complete(keep, self.masked.architecture)
        return 1 - self.cost.expected(full, self.settings.is_uniform) / self.budget.dense


def complete_layers(gates: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Broadcasts a whole-layer gate `(L, 1)` to both sub-layers."""
    if "layers" not in gates:
        return gates
    return {**gates, "layers": gates["layers"].expand(architecture.num_layers, 2)}


def sharpness_at(progress: float) -> float:
    """Sharpness of the keep probability after a share of training."""
    first, last = SHARPNESS
    return first * (last / first) ** progress


def target_at(step: int, num_steps: int, start: float, target: float) -> float:
    """Sparsity aimed at: linear from where training starts to the budget, then constant.

    The warm-up takes 10% of the steps, 20% above 60% sparsity (METHOD, section 3).
    """
    warmup = max(1, math.ceil(num_steps * (0.2 if target > 0.6 else 0.1)))
    return start + (target - start) * min(1.0, step / warmup)


def initial_shapes(
    architecture: Architecture, prune: tuple[str, ...], is_uniform: bool
) -> dict[str, tuple[int, ...]]:
    """Mask shapes of the structures to prune; in the stock layout layers go as a whole."""
    layers, units = architecture.num_layers, architecture.num_units
    shapes = {
        Axis.HIDDEN.value: (units[Axis.HIDDEN],),
        Axis.HEADS.value: (layers, units[Axis.HEADS]),
        Axis.FFN.value: (layers, units[Axis.FFN]),
        "layers": (layers, 1 if is_uniform else 2),
    }
    return {name: shapes[name] for name in prune}


def make_optimizer(objective: MaskObjective, learning_rate: float) -> torch.optim.Adam:
    """Adam that minimises over the masks and maximises over the multipliers."""
    return torch.optim.Adam(
        [
            {"params": list(objective.masks.parameters()), "lr": learning_rate},
            {
                "params": list(objective.lagrangian.parameters()),
                "lr": MULTIPLIER_LEARNING_RATE,
                "maximize": True,
            },
        ]
    )


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
    objective: MaskObjective,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    accelerator: Accelerator,
    settings: TrainingSettings,
    first_step: int,
    report: Callable[[Progress], None],
    save: Callable[[int], None],
    preemption: Preemption,
) -> int:
    """Trains the masks in place.

    Args:
        objective: loss; its masks and multipliers are trained.
        optimizer: from `make_optimizer`, with its state if the run is resumed.
        windows: tokens `(num_samples, seq_len)`, in the order in which they are used.
        accelerator: ranks and device.
        settings: of the loop.
        first_step: steps that are done already.
        report: called on every rank after each logged step.
        save: called on every rank when a state is due.
        preemption: asked after each step whether to stop; the state is saved then.

    Returns:
        Steps done: fewer than all if the run was asked to go.

    Raises:
        UserError: a loss term became NaN or infinite; the last saved state stays.
    """
    start = float(_initial_sparsity(objective))
    loader: DataLoader[Tensor] = DataLoader(
        windows,  # type: ignore[arg-type]  # a tensor has the two methods of a Dataset
        batch_size=settings.batch_size,
        drop_last=True,
    )
    loader = accelerator.prepare_data_loader(loader)
    done = first_step * settings.gradient_accumulation
    batches: Iterator[Tensor] = iter(accelerator.skip_first_batches(loader, done))
    batch = settings.batch_size * settings.gradient_accumulation * accelerator.num_processes
    meter = _Meter(settings.num_steps, batch * windows.shape[1], first_step)
    for step in range(first_step, settings.num_steps):
        progress = step / settings.num_steps
        target = target_at(step, settings.num_steps, start, objective.budget.sparsity)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - progress)
        for part in range(settings.gradient_accumulation):
            local = step * settings.gradient_accumulation + part
            number = local * accelerator.num_processes + accelerator.process_index
            terms = objective(next(batches), number, progress, target)
            (terms["loss"] / settings.gradient_accumulation).backward()
        _average_gradients(objective, accelerator)
        optimizer.step()
        optimizer.zero_grad()
        num_done = step + 1
        if num_done % settings.log_every == 0 or num_done == settings.num_steps:
            report(meter.read(num_done, _collect(terms, target, objective, accelerator, num_done)))
        is_stopped = preemption.agreed(accelerator)
        is_due = num_done % settings.save_every == 0 or is_stopped
        if is_due and num_done < settings.num_steps:
            _check_finite(objective, num_done)
            save(num_done)
        if is_stopped:
            return num_done
    _check_finite(objective, settings.num_steps)
    return settings.num_steps


def _average_gradients(objective: nn.Module, accelerator: Accelerator) -> None:
    """One collective for all that is trained: masks are small and replicated on every rank."""
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    mean: Any = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
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


def _initial_sparsity(objective: MaskObjective) -> Tensor:
    """Expected sparsity of freshly started masks: where the target's warm-up begins.

    Computed from the initial values and not the current ones, so that it is the same
    after a resume.
    """
    keep = {
        name: keep_probability(torch.full_like(mu, INITIAL_LOG_VAR), SHARPNESS[0])
        for name, mu in objective.masks.mu.items()
    }
    return objective.expected_sparsity(keep).detach()


def _collect(
    terms: dict[str, Tensor],
    target: float,
    objective: MaskObjective,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    names = list(terms)
    values: Any = accelerator.reduce(torch.stack([terms[n].detach() for n in names]), "mean")
    metrics = dict(zip(names, values.tolist(), strict=True))
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"step {step}: {name} is {value}; {UNSTABLE}")
    return {
        **metrics,
        "target": target,
        "lambda_1": float(objective.lagrangian.linear.detach()),
        "lambda_2": float(objective.lagrangian.quadratic.detach()),
    }


def _check_finite(objective: MaskObjective, step: int) -> None:
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"step {step}: {name} became NaN or infinite; {UNSTABLE}")
