"""Gates of a forward pass, split by layer all at once.

Rows that are taken one at a time cost a kernel each, and on the way back a table of zeros each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.families.base import UNIT_AXIS, Axis, Role

Gates = Mapping[str, Tensor]

# Beside the gates: how far a hidden dimension `(d,)` or a sub-layer `(L, 2)` is there, in [0, 1].
PRESENT_HIDDEN = "hidden.present"
PRESENT_LAYERS = "layers.present"
KEPT_HIDDEN = "hidden.kept"  # indices of the hidden dimensions that stay, once that is settled
# Projectors `(L, H, head_dim, head_dim)` onto the kept subspace of every head.
PROJECTORS = {Role.QUERY: "heads.query", Role.OUTPUT: "heads.output"}
WRITTEN = "written"  # the product of the gates of hidden dimensions and of a sub-layer

# Gates that have an entry for each unit of a layer -> the axis of those units.
UNITS_OF: dict[str, Axis] = {
    **{axis: axis for axis in UNIT_AXIS.values()},
    **dict.fromkeys(PROJECTORS.values(), Axis.HEADS),
}


class Alive:
    """Indices of the units that a smaller network has, `(num_kept,)` each.

    Args:
        keep: booleans `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`, on the network's device.
    """

    def __init__(self, keep: Gates):
        self.hidden = torch.nonzero(keep[Axis.HIDDEN]).flatten()
        self.units = {
            axis: [torch.nonzero(row).flatten() for row in keep[axis]]
            for axis in UNIT_AXIS.values()
        }


def by_layer(gates: Gates, alive: Alive | None) -> dict[str, Any]:
    """Gates as the places of a network take them.

    Args:
        gates: as `MaskedModel.set_gates` takes them.
        alive: the units that the network has; None for all.

    Returns:
        Those of units as one tensor for each layer, those of sub-layers as a pair for each, and
        among the latter `written`, each `(d,)`. All others as they are.
    """
    split: dict[str, Any] = dict(gates)
    if alive is not None:
        for name in gates.keys() & {Axis.HIDDEN, PRESENT_HIDDEN}:
            split[name] = gates[name].index_select(0, alive.hidden)
    for name in gates.keys() & UNITS_OF.keys():
        rows = gates[name].unbind()
        if alive is not None:
            pairs = zip(rows, alive.units[UNITS_OF[name]], strict=True)
            rows = tuple(row.index_select(0, kept) for row, kept in pairs)
        split[name] = rows
    if gates.keys() >= {Axis.HIDDEN, "layers"}:
        split[WRITTEN] = _pairs(split[Axis.HIDDEN] * gates["layers"].unsqueeze(-1))
    for name in gates.keys() & {"layers", PRESENT_LAYERS}:
        split[name] = _pairs(gates[name])
    return split


def _pairs(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`(L, 2, ...)` as the values of both sub-layers, for every layer."""
    rows = values.flatten(0, 1).unbind()
    return list(zip(rows[::2], rows[1::2], strict=True))


def presence(keep: Gates, num_layers: int) -> dict[str, Tensor]:
    """Entries for `set_gates` that say how far hidden dimensions and sub-layers are there.

    Args:
        keep: probabilities or booleans to keep, `hidden (d,)` and `layers (L, 1 or 2)`, each
            where it is pruned.
        num_layers: `L`.
    """
    found = {}
    if "hidden" in keep:
        found[PRESENT_HIDDEN] = keep["hidden"].float()
    if "layers" in keep:
        found[PRESENT_LAYERS] = keep["layers"].float().expand(num_layers, 2)
    return found
