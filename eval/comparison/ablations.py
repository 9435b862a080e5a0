"""The product with one of its levers taken away, each a method of the comparison.

Most are options of `prune`. Some parts have no option, as nobody should do without: a kind of job
lacks them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.allocation.candidates import Candidates
from llm_vtrans.allocation.choosing import Chooser
from llm_vtrans.basis.oblique import AnyBasis
from llm_vtrans.budget.problem import Problem
from llm_vtrans.job import CHOICE_EXAMPLES, Job
from llm_vtrans.masking.by_layer import Gates
from llm_vtrans.tasks.encoding import Batch, inputs_of
from llm_vtrans.training.distillation import Distillation, with_sum
from llm_vtrans.training.rehearsal import Rehearsal


class Labels(Distillation):
    """Without a teacher: the next token of the text."""

    def teach(self, inputs: Batch) -> None:
        """Nothing."""

    def loss(self, inputs: Batch, taught: Any) -> Tensor:
        """Mean cross-entropy in nats, shape `()`, under the gates in force."""
        logits, tokens = self.masked(inputs), inputs["input_ids"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def forward(self, batch: Batch, gates: Gates) -> dict[str, Tensor]:
        """The same under these gates, by the name that all stages report."""
        self.masked.set_gates(gates)
        return with_sum({"distillation": self.loss(inputs_of(batch), None)})


class NoFitJob(Job):
    """Tuning starts from the maps of the plan."""

    is_fitted = False


class LabelJob(NoFitJob):
    """Learns from the text, not from the dense network."""

    def _connect(self, model: PreTrainedModel, teacher: nn.Module | None = None) -> None:
        super()._connect(model, teacher)
        self.distillation = Labels(self.masked)


class BinaryJob(Job):
    """Masks say which units stay, and nothing of `mu` stays with these."""

    def search(self) -> None:
        """Trains the masks, then divides `mu` out: what says how redundant a unit is stays."""
        super().search()
        with torch.no_grad():
            for name, alpha in self.masks.log_alpha().items():
                self.masks.log_var[name].copy_(alpha)
                self.masks.mu[name].fill_(1)


class _OwnPlan(Chooser):
    """Takes the plan that the masks propose."""

    def choose(self, problem: Problem, rehearsal: Rehearsal | None = None) -> PrunePlan:
        first = Candidates(self._masks, problem, self._oblique).first
        return replace(first, basis=self._head_basis)


class OwnPlanJob(Job):
    """Compares no plans."""

    def chooser(self, oblique: AnyBasis | None = None) -> Chooser:
        """One that looks at examples only to tell what the plan loses."""
        examples = self._first_batches(CHOICE_EXAMPLES, self.choice)
        basis = _needed(oblique)
        return _OwnPlan(self.distillation, self.masks, examples, basis, self.head_basis)


class OwnBasisJob(Job):
    """Keeps to the basis that the masks were trained in."""

    def chooser(self, oblique: AnyBasis | None = None) -> Chooser:
        """One that tries no other basis."""
        return super().chooser(_needed(oblique))


class NoRehearsalJob(Job):
    """Compares plans as they are before tuning."""

    def rehearsal(self) -> None:
        """None."""


def _needed(oblique: AnyBasis | None) -> AnyBasis | None:
    """The basis where no other will do."""
    return oblique if oblique is not None and oblique.is_needed else None


@dataclass(frozen=True)
class Ablation:
    """What differs from a run with all defaults.

    Attributes:
        options: of `prune`.
        kind: of job.
        reuses_masks: whether one training serves all sizes.
    """

    options: tuple[str, ...] = ()
    kind: type[Job] = Job
    reuses_masks: bool = True


_AS_IT_IS = ("--token-noise", "0", "--own-words", "0")  # text that labels can be read from
ABLATIONS = {
    "ours-no-rotation": Ablation(("--rotate", "none")),
    "ours-no-distillation": Ablation(_AS_IT_IS, LabelJob),
    "ours-no-mu": Ablation(kind=BinaryJob),
    "ours-no-local-search": Ablation(kind=OwnPlanJob),
    "ours-no-hidden": Ablation(("--prune", "heads,ffn,layers")),
    "ours-no-rehearsal": Ablation(kind=NoRehearsalJob),
    "ours-no-oblique-basis": Ablation(kind=OwnBasisJob),
    "ours-no-regression": Ablation(kind=NoFitJob),
    "ours-no-tuning": Ablation(("--tune-share", "0")),
    "ours-no-token-noise": Ablation(("--token-noise", "0")),
    "ours-no-own-words": Ablation(("--own-words", "0")),
    "ours-no-reuse": Ablation(reuses_masks=False),
}
"""Every ablation by the name that `--methods` takes."""


def ablation_of(method: str | None) -> Ablation:
    """How the product runs as this method of the comparison: with all defaults unless it is one."""
    return ABLATIONS.get(method or "", Ablation())
