"""RECOVER: what may be done to a pruned model with the dense one at hand.

Each method is one module here with a function `recover` of the type `Recover`; its name is
the module's, with hyphens for underscores.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from llm_vtrans.errors import UserError
from llm_vtrans.export import Pruning

Recover = Callable[[PreTrainedModel, PreTrainedModel, Pruning, Tensor], PreTrainedModel]
"""(dense model, pruned model, what was exported, calibration tokens `(n, seq)`) -> model."""


def recovery_for(name: str) -> Recover:
    """The recovery method of this name.

    Raises:
        UserError: there is none; the message lists them.
    """
    module = f"{__name__}.{name.replace('-', '_')}"
    if find_spec(module) is None:
        known = ", ".join(sorted(m.name.replace("_", "-") for m in iter_modules(__path__)))
        raise UserError(f"no recovery {name!r}; known are {known}")
    return cast(Recover, import_module(module).recover)
