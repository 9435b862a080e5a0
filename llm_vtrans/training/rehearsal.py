"""ALLOCATE, last: the first steps of tuning, for plans that are compared and then forgotten.

What a plan loses before it is tuned says too little. Tuning trains matrices where layers meet the
stream, but only factors of heads and FFN units: it makes good more of what went with hidden
dimensions. A few steps show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from llm_vtrans.errors import UserError
from llm_vtrans.tasks.encoding import Examples
from llm_vtrans.training.distillation import Distillation
from llm_vtrans.training.loop import TrainingSettings, tokens_per_step, train
from llm_vtrans.training.preemption import Preemption
from llm_vtrans.training.tune import TuneObjective

NUM_STEPS = 15
SHARE = 0.5  # of the steps of tuning, that the rehearsals of a choice may take together


@dataclass(frozen=True)
class Rehearsal:
    """The tuning that a run will do, cut short.

    Attributes:
        examples: of the whole run; those are used that tuning begins with.
        accelerator: ranks and device.
        settings: of the run's loop, with steps that tune.
        preemption: of the run.
        say: tells the user what was found.
    """

    examples: Examples
    accelerator: Accelerator
    settings: TrainingSettings
    preemption: Preemption
    say: Callable[[str], None]

    @property
    def most(self) -> int:
        """Rehearsals that a choice may take: of a short run they would be the largest part."""
        return int(SHARE * self.settings.tune_steps / NUM_STEPS)

    def tune(self, distillation: Distillation, hard: Mapping[str, Tensor], loss: float) -> None:
        """Trains the tuning from where it is; gates are in force afterwards.

        Args:
            distillation: masked network of frozen weights, and its teacher.
            hard: gate values of a plan.
            loss: of the network that they make, in nats.
        """
        num_tokens = tokens_per_step(self.settings, self.accelerator, self.examples)
        objective = TuneObjective(distillation, hard, loss, num_tokens, 0.0, self.settings)
        objective.stage = objective.stage[:NUM_STEPS]
        with suppress(UserError):  # a loss that is no number: the network says so, too
            train(
                objective, objective.optimizer(), self.examples, self.accelerator, self.settings,
                objective.stage.start, _ignore, _ignore, self.preemption,
            )  # fmt: skip
        distillation.masked.set_gates(hard)


def _ignore(_: object) -> None:
    """Nothing of a rehearsal is reported or saved."""
