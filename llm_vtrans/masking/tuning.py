"""What is trained after the gates, all of which export folds into the weights.

Hidden pruning keeps a subspace of the residual stream. PCA picks the one of largest
variance; the network's output may need another, and what writes to the stream may
project onto it along other directions than it is read. So square matrices are trained:
SliceGPT's change of basis (arXiv:2401.15024, section 3), oblique and learned. One serves what
embeddings write, one what the head reads, and sub-layers share theirs in groups of neighbours,
as many as memory allows. Beside them every place where a gate multiplies has factors
of its own, as (IA)^3 has (arXiv:2205.05638).
The weights stay frozen, and nothing is left over at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.basis.rotation import Basis, FinalNorm
from llm_vtrans.families.base import Architecture, Axis, Norm, Place, Stream, Sublayer, TensorSpec

INPUT, OUTPUT, SHIFT = "in", "out", "shift"
MAP_SHARE = 1 / 16  # as many numbers as the model has are trained in maps, at 12 bytes each,
MAP_NUMBERS = 2**26  # or so many, 0.75 GiB: small models can afford a pair for every sub-layer
MAP_LEARNING_RATE = 1 / 80  # of a map's singular values, 1; times the distance from the optimum
TOKENS_PER_DIMENSION = 16  # with which half of the power of a map's mean gradient is signal
SCALE_LEARNING_RATE = 0.015  # times that distance


def scale_name(module: str, side: str) -> str:
    """Key of the factors at one side of a module; parameter names may not contain dots."""
    return f"{module}:{side}".replace(".", "/")


class Tuning(nn.Module):
    """Maps of the residual stream and factors at every gate, float32, at first the identity.

    With a kept set `K` of hidden dimensions, what writes becomes `(map @ W)[K]` and what reads
    `W @ map[:, K]`. A head that is the embeddings' table reads through their map, transposed; after
    a rotation, where the tuning does not act, through the final norm's own matrix in the new basis
    (`tie`): only then it is the dense head. What the final norm adds is trained there, too.
    Where that table stands behind a layer of the head's own, this one has a map as all heads have.

    They act where gates are set and `is_on` is. Once `K` is settled, the rest of them goes.

    Args:
        architecture: table of the model.
        is_rotated: whether the stream's basis was changed (`Architecture.rotates`).
        is_empty: neither maps nor factors.
    """

    def __init__(self, architecture: Architecture, is_rotated: bool, is_empty: bool = False):
        super().__init__()
        self._size = architecture.num_units[Axis.HIDDEN]
        self._kept: Tensor | None = None  # indices of hidden dimensions, once they are settled
        self._is_tied = _reads_through_table(architecture)
        self.final_norm: FinalNorm | None = None  # by `tie`
        final = architecture.final_norm.rpartition(".")[0]
        self._final_scale, self._final_shift = (scale_name(final, s) for s in (OUTPUT, SHIFT))
        places = {Place.START, Place.WRITE, Place.READ}
        if not self._is_tied:
            places.add(Place.END)
        self._sublayers_per_map = sublayers_per_map(architecture)
        self.maps = nn.ParameterDict(
            {
                self.map_name(spec, layer): nn.Parameter(torch.eye(self._size))
                for spec, layer in architecture.named_tensors().values()
                if not is_empty and spec.place in places
            }
        )
        self.shift: nn.Parameter | None = None  # of the final norm, where it has a bias
        if is_rotated and self._is_tied and architecture.norm is Norm.LAYER and not is_empty:
            self.shift = nn.Parameter(torch.zeros(self._size))
        self.scales = nn.ParameterDict()
        for name, (spec, _) in architecture.named_tensors().items():
            module, _, leaf = name.rpartition(".")
            if not is_empty and leaf == "weight":
                for side, size in _sides(architecture, spec).items():
                    self.scales[scale_name(module, side)] = nn.Parameter(torch.ones(size))
        self.is_rotated, self.is_on = is_rotated, False

    @property
    def moves_stream(self) -> bool:
        """Whether the stream has another basis than without: oblique, after a rotation."""
        return self.is_on and self.is_rotated

    def scale(self, module: str, side: str) -> Tensor | None:
        """Factors at one side of a module, `(width,)`, or one for each of its heads."""
        return self.scales.get(scale_name(module, side)) if self.is_on else None

    def map_name(self, spec: TensorSpec, layer: int | None) -> str:
        """Key of the map where a tensor meets the stream, whether there is one or not."""
        if spec.sublayer is None or layer is None:
            return spec.place.value
        return f"{spec.place.value}{spec.depth(layer) // self._sublayers_per_map}"

    def tie(self, final_norm: FinalNorm) -> None:
        """Says what a tied head needs while the tuning does not act."""
        device, shift = next(self.parameters()).device, final_norm.shift
        self.final_norm = FinalNorm(
            final_norm.matrix.to(device), None if shift is None else shift.to(device)
        )

    def shifts(self, has_gates: bool) -> tuple[Tensor | None, Tensor | None]:
        """What a tied head's input is moved by in front of its map and behind it, `(width,)`."""
        if self.is_on and has_gates:
            return self.shift, None
        return None, None if self.final_norm is None else self.final_norm.shift

    def prepared(
        self, kept: Tensor | None, dtype: torch.dtype, has_gates: bool = True
    ) -> dict[str, Tensor]:
        """The maps by `map_name`, as a pass needs them: made once for all places that share them.

        Args:
            kept: indices of the hidden dimensions that stay, `(num_kept,)`; None for all.
            dtype: of the activations.
            has_gates: whether gates are set.

        Returns:
            `(num_kept, hidden_size)` of what is written, `(hidden_size, num_kept)` of what is
            read; nothing but a tied head's unless the tuning acts.
        """
        maps: dict[str, Tensor] = dict(self.maps.items()) if self.is_on and has_gates else {}
        if self._is_tied and maps:
            maps[Place.END] = maps[Place.START].T
        elif self.final_norm is not None:
            maps[Place.END] = self.final_norm.matrix
        if kept is not None and self._kept is None:
            maps = {n: m.index_select(_side(n), kept) for n, m in maps.items()}
        return {name: matrix.to(dtype) for name, matrix in maps.items()}

    @torch.no_grad()
    def settle(self, kept: Tensor | None) -> None:
        """Lets go of the maps' parts for hidden dimensions that went: they would never be used.

        Of a large model these are gigabytes, several times over while they are trained.

        Args:
            kept: as `prepared` is given from now on.
        """
        if kept is None or self._kept is not None:
            return
        for name, matrix in self.maps.items():
            self.maps[name] = nn.Parameter(matrix.index_select(_side(name), kept))
        self._kept = kept

    def recall(self, tensors: Mapping[str, Tensor], kept: Tensor | None) -> None:
        """Takes what was trained.

        Args:
            tensors: of another's `state_dict`, among others.
            kept: indices of the hidden dimensions that stayed; None for all.
        """
        if any(tensors[f"maps.{name}"].shape != m.shape for name, m in self.maps.items()):
            self.settle(kept)
        self.load_state_dict({name: tensors[name] for name in self.state_dict()})

    @torch.no_grad()
    def start(self, maps: Mapping[Place, Tensor] | None) -> None:
        """Sets the maps, each `(hidden_size, hidden_size)`, and acts with them; factors are one.

        Args:
            maps: of `Place.WRITE` and `Place.READ`, which embeddings and head begin with, too; for
                a tied head at `Place.END` the final norm's factors and what it adds,
                `(2, hidden_size)`. None for the identity, and not to act.
        """
        self.is_on = maps is not None
        for name, parameter in self.maps.items():
            if maps is None:
                parameter.zero_().fill_diagonal_(1)
            else:
                parameter.copy_(maps[Place.WRITE if _writes(name) else Place.READ])
        for scale in self.scales.values():
            scale.fill_(1)
        if self.shift is not None:
            self.shift.zero_()
        if maps is not None and self._is_tied:
            self.scales[self._final_scale].copy_(maps[Place.END][0])
            if self.shift is not None:
                self.shift.copy_(maps[Place.END][1])

    def basis(self, rotation: Tensor | None) -> Basis | None:
        """The stream's directions, maps and rotation in one; None if neither is there.

        Args:
            rotation: `(hidden_size, hidden_size)`, columns the directions that the maps act on.
        """
        if not self.maps:
            return None if rotation is None else Basis.rotation(rotation)

        @lru_cache(maxsize=len(Place))  # tensors are asked for one after the other
        def directions(name: str) -> Tensor | None:
            if self._is_tied and name == Place.END:
                name = Place.START
            if name not in self.maps:
                return None
            matrix = self._whole(name)
            columns = matrix.T if _writes(name) else matrix
            return columns if rotation is None else rotation.to(columns.device) @ columns

        return Basis(
            lambda spec, layer: directions(self.map_name(spec, layer)), rotation is not None
        )

    def _whole(self, name: str) -> Tensor:
        """A map of all dimensions, zero for those that went."""
        matrix = self.maps[name].detach()
        if self._kept is None:
            return matrix
        return matrix.new_zeros(self._size, self._size).index_copy_(_side(name), self._kept, matrix)

    def factors(self) -> dict[str, Tensor]:
        """The factors, and what the final norm adds, by `scale_name`; on the CPU."""
        found = dict(self.scales.items())
        if self.shift is not None:
            found[self._final_shift] = self.shift
        return {name: values.detach().cpu() for name, values in found.items()}

    def parameter_groups(self, loss: float, num_tokens: int) -> list[dict[str, Any]]:
        """For `OrthogonalAdamW`; `peak` is the largest learning rate of a group.

        A step moves a map by the same share of it, whatever the width (arXiv:2310.17813, section
        3), where the loss is curved alike. But it does not know how far there is to go. Near the
        teacher the loss is a quadratic, so that distance is its root, and so is the noise of a
        gradient. Nor does it know how much of a direction is noise: of the power of a mean over
        n tokens in d dimensions about n / (n + c d) is signal (arXiv:1812.06162, section 2.2,
        its noise scale taken to grow with d), and steps are as much shorter as amplitudes are.

        Args:
            loss: before training, in nats.
            num_tokens: of an optimizer step, over all ranks.
        """
        distance = math.sqrt(min(1.0, max(0.0, loss)))  # rounding may bring it below zero
        scales = list(self.scales.parameters())
        scales += [] if self.shift is None else [self.shift]
        signal = math.sqrt(num_tokens / (num_tokens + TOKENS_PER_DIMENSION * self._size))
        rate = MAP_LEARNING_RATE * signal * distance
        maps: dict[Place, list[Tensor]] = {}
        for name, matrix in self.maps.items():
            maps.setdefault(_place(name), []).append(matrix)
        return [
            *({"params": m, "peak": rate, "is_orthogonal": True} for m in maps.values()),
            {"params": scales, "peak": SCALE_LEARNING_RATE * distance},
        ]


def num_maps(architecture: Architecture) -> int:
    """Maps of embeddings, sub-layers and head."""
    num_ends = 1 if _reads_through_table(architecture) else 2
    return num_ends + 2 * -(-_num_sublayers(architecture) // sublayers_per_map(architecture))


def sublayers_per_map(architecture: Architecture) -> int:
    """Neighbouring sub-layers that share a map of what they write and one of what they read."""
    numbers = max(MAP_NUMBERS, MAP_SHARE * architecture.num_parameters)
    num = numbers / architecture.num_units[Axis.HIDDEN] ** 2
    num_groups = max(1, int(num - 2) // 2)  # beside embeddings and head
    return -(-_num_sublayers(architecture) // num_groups)


def _reads_through_table(architecture: Architecture) -> bool:
    """Whether what reads the stream last is the embeddings' table."""
    return architecture.tied_head is not None and not architecture.is_post_norm


def _num_sublayers(architecture: Architecture) -> int:
    return len(Sublayer) * architecture.num_layers


def _place(name: str) -> Place:
    """Where a map is, by its key."""
    return next(place for place in Place if name.startswith(place))


def _writes(name: str) -> bool:
    """Whether a map stands behind what writes to the stream."""
    return _place(name) in (Place.START, Place.WRITE)


def _side(name: str) -> int:
    """The dimension of a map that lies along the stream."""
    return 0 if _writes(name) else 1


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
