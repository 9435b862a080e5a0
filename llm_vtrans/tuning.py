"""What is trained after the gates, all of which export folds into the weights.

Hidden pruning keeps a subspace of the residual stream. PCA picks the one of largest
variance; the network's output may need another, and what writes to the stream may
project onto it along other directions than it is read. So two matrices that serve the
whole network are trained, one at all writes and one at all reads: SliceGPT's
change of basis (arXiv:2401.15024, section 3), oblique and learned. Beside them
every place where a gate multiplies has factors of its own, as (IA)^3 has (arXiv:2205.05638).
The weights stay frozen, and nothing is left over at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.families.base import Architecture, Axis, Stream, TensorSpec
from llm_vtrans.rotation import Basis

WRITE, READ = "write", "read"
INPUT, OUTPUT = "in", "out"
MAP_LEARNING_RATE = 0.2  # divided by the width
SCALE_LEARNING_RATE = 0.003


def scale_name(module: str, side: str) -> str:
    """Key of the factors at one side of a module; parameter names may not contain dots."""
    return f"{module}:{side}".replace(".", "/")


class Tuning(nn.Module):
    """Maps of the residual stream and factors at every gate, float32, at first the identity.

    With a kept set `K` of hidden dimensions, writers become `(write @ W)[K]` and readers
    `W @ read[:, K]`.

    They act where gates are set and `is_on` is.

    Args:
        architecture: table of the model.
        has_maps: whether the stream may change its basis (`Family.rotates`).
        has_scales: whether there are factors.
    """

    def __init__(self, architecture: Architecture, has_maps: bool, has_scales: bool = True):
        super().__init__()
        size = architecture.num_units[Axis.HIDDEN]
        self.maps = nn.ParameterDict(
            {name: nn.Parameter(torch.eye(size)) for name in (WRITE, READ) if has_maps}
        )
        self.scales = nn.ParameterDict()
        for name, (spec, _) in architecture.named_tensors().items():
            module, _, leaf = name.rpartition(".")
            if has_scales and leaf == "weight":
                for side, size in _sides(architecture, spec).items():
                    self.scales[scale_name(module, side)] = nn.Parameter(torch.ones(size))
        self.is_on = False

    def scale(self, module: str, side: str) -> Tensor | None:
        """Factors at one side of a module, `(width,)`, or one for each of its heads."""
        return self.scales.get(scale_name(module, side)) if self.is_on else None

    def map(self, name: str) -> Tensor | None:
        """Map of what is written or read, `(hidden_size, hidden_size)`."""
        return self.maps.get(name) if self.is_on else None

    @torch.no_grad()
    def start(self, maps: Mapping[str, Tensor] | None) -> None:
        """Sets the maps, each `(hidden_size, hidden_size)`, and acts with them.

        Args:
            maps: what `map` gives until training changes it; None for the identity, and not to act.
        """
        self.is_on = maps is not None
        for name, parameter in self.maps.items():
            parameter.copy_(torch.eye(len(parameter)) if maps is None else maps[name])

    def basis(self, rotation: Tensor | None) -> Basis | None:
        """The stream's directions, maps and rotation in one; None if it was not rotated.

        Args:
            rotation: `(hidden_size, hidden_size)`, columns the directions that the maps act on.
        """
        if rotation is None:
            return None
        if not self.maps:
            return Basis.rotation(rotation)
        write, read = (self.maps[name].detach().to(rotation.device) for name in (WRITE, READ))
        return Basis(rotation @ write.T, rotation @ read)

    def factors(self) -> dict[str, Tensor]:
        """The factors by `scale_name`, on the CPU."""
        return {name: scale.detach().cpu() for name, scale in self.scales.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer of Adam's kind; `peak` is the largest learning rate of a group.

        A step of Adam moves every entry alike, so a map's effect grows with its width: its
        rate is inverse to that (maximal update parametrisation, arXiv:2203.03466, table 3).
        """
        maps, scales = list(self.maps.parameters()), list(self.scales.parameters())
        groups = [{"params": [p], "peak": MAP_LEARNING_RATE / p.shape[1]} for p in maps]
        return [*groups, {"params": scales, "peak": SCALE_LEARNING_RATE}]


def _sides(architecture: Architecture, spec: TensorSpec) -> dict[str, int]:
    """Where a tensor's module has factors, and how many."""
    if spec.stream in (Stream.SCALES, Stream.RENEWS):
        return {OUTPUT: spec.dims[0].size}
    if not spec.is_write:
        return {}
    units = {dim.axis: dim for dim in spec.dims if dim.axis is not None}
    hidden = units.pop(Axis.HIDDEN)
    sides = {OUTPUT: hidden.size}
    for axis, dim in units.items():  # heads whose basis may change have one factor each
        sides[INPUT] = architecture.num_units[axis] if dim.roles else dim.size
    return sides
