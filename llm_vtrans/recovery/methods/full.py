"""RECOVER by training all weights in float32, distilling from the dense network."""

from __future__ import annotations

from transformers import PreTrainedModel

from llm_vtrans.export.pruning import Pruning
from llm_vtrans.recovery.training import RecoveryRun, distil
from llm_vtrans.tasks.encoding import Examples

IS_FLOAT32, IS_GENERAL, RUNS_SLICED = True, True, False
LEARNING_RATE = 3e-4


def check() -> None:
    """Nothing is needed that is not there."""


def recover(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    pruning: Pruning,
    examples: Examples,
    run: RecoveryRun,
) -> PreTrainedModel:
    """Trains every weight; as `llm_vtrans.recovery.methods.Recover`."""
    pruned.requires_grad_(True)
    distil(dense, pruned, pruned.parameters(), LEARNING_RATE, examples, run)
    return pruned.requires_grad_(False)
