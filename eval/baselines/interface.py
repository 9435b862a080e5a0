"""What every method of the comparison takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.rotation import Basis
from llm_vtrans.budget.cost import Budget, dense_shape, parameter_cost
from llm_vtrans.budget.problem import Problem
from llm_vtrans.export.pruning import Pruning, export_model
from llm_vtrans.families import Architecture
from llm_vtrans.loading.source import Source

SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Case:
    """One thing to be pruned.

    Attributes:
        source: the dense checkpoint.
        windows: calibration tokens `(num_windows, seq_len)` that a selection looks at.
        heldout: further ones `(num_heldout, seq_len)`, on which it chooses among candidates.
        sparsity: share of all parameters to remove.
        is_uniform: stock layout: one shape for all layers.
        seed: of random draws; the windows were drawn with it too.
        folder: existing scratch folder for the exported checkpoint.
        device: to compute on.
    """

    source: Source
    windows: Tensor
    heldout: Tensor
    sparsity: float
    is_uniform: bool
    seed: int
    folder: Path
    device: torch.device

    def problem(self, architecture: Architecture, reserved: int = 0) -> Problem:
        """Budget over all parameters of the dense model, less what a method adds by itself.

        Args:
            architecture: the table after rotation, if there is one.
            reserved: parameters to leave free.
        """
        dense = parameter_cost(self.source.architecture).of(dense_shape(self.source.architecture))
        target = int((1 - self.sparsity) * dense) - reserved
        cost = parameter_cost(architecture)
        return Problem(architecture, cost, Budget("params", target, dense), 1, self.is_uniform)

    def export(
        self, architecture: Architecture, plan: PrunePlan, basis: Tensor | None
    ) -> tuple[Pruning, PreTrainedModel]:
        """Writes the product's checkpoint and loads it as its user would, in float32."""
        pruning = Pruning(
            self.source.checkpoint,
            architecture,
            plan,
            None if basis is None else Basis.rotation(basis),
        )
        source = self.source
        export_model(
            pruning, source.family, source.config, self.is_uniform, self.folder, SHARD_SIZE
        )
        return pruning, load_pruned(self.folder, self.device)


@dataclass(frozen=True)
class Cost:
    """What a pruning took.

    Attributes:
        seconds: of wall time.
        peak_rss: resident memory at most, bytes.
    """

    seconds: float
    peak_rss: int


@dataclass(frozen=True)
class Pruned:
    """A pruned model ready to be scored.

    Attributes:
        model: in float32, on the case's device.
        num_params: all its parameters, what a method adds included.
        pruning: plan and rotation behind it.
        added_macs: multiply-accumulates per token that the plan's shape does not show.
        note: what a reader of the table has to know.
        cost: what the pruning took, where a part was done before; None for what this call took.
    """

    model: PreTrainedModel
    num_params: int
    pruning: Pruning
    added_macs: int = 0
    note: str = ""
    cost: Cost | None = None


class Method(Protocol):
    """Anything that prunes.

    Attributes:
        is_uniform: whether all layers come out alike, so that both layouts are one.
        is_plain: whether the result is an exported network, which recovery can work on.
    """

    @property
    def is_uniform(self) -> bool: ...  # noqa: D102

    @property
    def is_plain(self) -> bool: ...  # noqa: D102

    def prune(self, case: Case) -> Pruned:
        """Prunes to the case's budget.

        Raises:
            UserError: the budget is out of the method's reach, or the family out of its scope.
        """


def load_pruned(folder: Path, device: torch.device) -> PreTrainedModel:
    """Loads an exported checkpoint in float32 for scoring."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()  # type: ignore[arg-type]


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Rounds a model that only lives in memory as an export to the checkpoint's dtype would."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model
