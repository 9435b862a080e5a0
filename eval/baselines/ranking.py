"""Importances of any scale -> scores in (0, 1), which is what allocation takes.

Heads, FFN units, hidden dimensions and layers have importances that do not compare. Their
ranks do: a unit's score is the share of units that it beats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.baselines.network import Importances
from llm_vtrans.families.base import UNIT_AXIS


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, spread evenly over (0, 1), float64."""
    order = values.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    return (order + 0.5) / values.shape[-1]


def uniform_ranks(importances: Importances, num_layers: int) -> list[dict[str, Tensor]]:
    """Units are ranked within their layer, so that each layer loses the same share."""
    return [
        {
            name: ranks(values.flatten()).view_as(values) if name == "layers" else ranks(values)
            for name, values in importances.items()
        }
    ]


def joint_ranks(importances: Importances) -> dict[str, Tensor]:
    """Heads and FFN units of all layers are ranked in one order; other structures apart."""
    units = [axis.value for axis in UNIT_AXIS.values() if axis.value in importances]
    together = ranks(torch.cat([importances[name].flatten() for name in units]))
    parts = together.split([importances[name].numel() for name in units])
    joint = {n: part.view_as(importances[n]) for n, part in zip(units, parts, strict=True)}
    apart = {n: ranks(values) for n, values in importances.items() if n not in joint}
    return {**joint, **apart}
