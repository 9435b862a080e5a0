"""RECOVER: what may be done to a pruned model with the dense one at hand.

Each method is one module here of the type `Recovery`; its name is the module's, with hyphens
for underscores.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Protocol, cast

from transformers import PreTrainedModel

from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.recovery.training import RecoveryRun
from llm_vtrans.tasks.encoding import Examples


class Recover(Protocol):
    """Changes a pruned network so that it answers as the dense one does."""

    def __call__(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        pruning: Pruning,
        examples: Examples,
        run: RecoveryRun,
    ) -> PreTrainedModel:
        """Recovers in place.

        Args:
            dense: the network before pruning, in its own basis.
            pruned: the exported network.
            pruning: what was exported: kept units, gates, rotation.
            examples: calibration sequences.
            run: ranks, steps and dtype of what trains.

        Returns:
            `pruned`, with the parameters that it had.

        Raises:
            UserError: too few examples, or the training diverged.
        """


class Recovery(Protocol):
    """A module of this package.

    Attributes:
        IS_FLOAT32: whether the networks' weights have to be float32 meanwhile.
        IS_GENERAL: whether it works on any network; else on an exported causal LM with RMSNorm,
            which it can run layer by layer.
        RUNS_SLICED: whether it works on weights that lie in slices over the ranks (ZeRO-3).
    """

    IS_FLOAT32: bool
    IS_GENERAL: bool
    RUNS_SLICED: bool

    recover: Recover

    def check(self) -> None:
        """Whether the libraries that it needs are there.

        Raises:
            UserError: one is not.
        """


def recovery_for(name: str) -> Recovery:
    """The recovery method of this name.

    Raises:
        UserError: there is none; the message lists them.
    """
    module = f"{__name__}.{name.replace('-', '_')}"
    if find_spec(module) is None:
        known = ", ".join(sorted(m.name.replace("_", "-") for m in iter_modules(__path__)))
        raise UserError(f"no recovery {name!r}; known are {known}")
    return cast(Recovery, import_module(module))
