"""SHRINK: units that the masks have given up leave the network while it is still searched.

Steps then get faster as the network gets smaller (iterative pruning, as in VTrans,
arXiv:2406.05276). The network is cut by the rules of export, so that it computes what it
computed with those units at zero; masks, budget and allocation keep their full size. At the
end of the search it is whole again, with zeros where units went, and no later stage knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm_vtrans.allocation.allocate import allocate
from llm_vtrans.budget.cost import complete
from llm_vtrans.budget.problem import Problem
from llm_vtrans.errors import UserError
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.families.base import UNIT_AXES, UNIT_AXIS, Axis, Sublayer, TensorSpec
from llm_vtrans.loading.source import Source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.masks import SHARPNESS, VIBMasks, keep_probability
from llm_vtrans.training.smaller import Keep, attach, bound, cut, smaller_network

GIVEN_UP = 0.01  # keep probability from which a unit does not come back
NEVER = 20.0  # `log_var` of a unit that went: no rank is lower
PREFIX = "alive."  # of tensors in a saved state
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Shrinker:
    """Takes units out of a network whose weights are trained, and puts it back to full size.

    Attributes:
        masked: the network, with a teacher of its own.
        source: gives family and config.
        problem: budget and layout; what meets it now does not go.
        every: steps between two looks at the masks.
        recomputes: as `Distillation`.
    """

    masked: MaskedModel
    source: Source
    problem: Problem
    every: int
    recomputes: bool = False
    _whole: nn.Module = field(init=False)
    _pruning: Pruning | None = None  # of the present network; None while it is whole

    def __post_init__(self) -> None:
        self._whole = self.masked.model

    @property
    def alive(self) -> Keep | None:
        """Units that are left, as `PrunePlan.keep`; None while all are."""
        return None if self._pruning is None else self._pruning.plan.keep

    def step(self, step: int, masks: VIBMasks, optimizer: torch.optim.Optimizer) -> None:
        """Takes out what is given up, where a step is one that looks.

        Args:
            step: steps done.
            masks: trained; those of units that go are set to never come back.
            optimizer: of the weights, whose moments go along.
        """
        if step == 0 or step % self.every:
            return
        alive = self._alive_by(masks)
        before = self.alive or _all(alive)
        if all(bool((alive[name] == before[name]).all()) for name in alive):
            return
        self.shrink(alive, optimizer)
        with torch.no_grad():
            for name in masks.names():
                if name in alive:
                    masks.log_var[name][~alive[name].to(masks.log_var[name].device)] = NEVER

    def _alive_by(self, masks: VIBMasks) -> dict[str, Tensor]:
        """Units with a chance, and those of the plan that meets the budget now."""
        found = {name: keep_probability(a.detach().cpu(), SHARPNESS[1]) > GIVEN_UP
                 for name, a in masks.log_alpha().items()}  # fmt: skip
        alive = {n: k.bool() for n, k in complete(found, self.problem.architecture).items()}
        for index, part in enumerate(Sublayer):
            alive[UNIT_AXIS[part]] &= alive["layers"][:, index, None]
        try:
            keep = allocate(masks, self.problem).keep
        except UserError:  # the budget is out of reach of these masks yet
            keep = _all(alive)
        old = self.alive or _all(alive)
        return {axis.value: (alive[axis] | keep[axis]) & old[axis] for axis in UNIT_AXES}

    @torch.no_grad()
    def shrink(self, alive: Keep, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Cuts the network down to these units.

        Args:
            alive: booleans, `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`.
            optimizer: of the weights, if they were trained before.
        """
        weights = self._weights()
        pruning = bound(alive, self.source, self.problem.architecture)
        small = smaller_network(pruning, self.source, self._whole, self.recomputes)
        for name, (source, spec, layer) in pruning.tensors().items():
            parameter = small.get_parameter(name)
            kept = cut(weights[source], pruning, spec, layer)
            parameter.copy_(pruning.fold(kept, spec, layer))
            parameter.requires_grad_(self._whole.get_parameter(source).requires_grad)
        if optimizer is not None:
            self._hand_over(optimizer, small, pruning)
        self._pruning = pruning
        attach(self.masked, small, pruning)

    @torch.no_grad()
    def expand(self) -> None:
        """Makes the network whole again, with zeros where units went."""
        if self._pruning is None:
            return
        weights = self._weights()
        for name in self.problem.architecture.named_tensors():
            parameter = self._whole.get_parameter(name)
            parameter.copy_(weights[name] if name in weights else torch.zeros(()))
        self._pruning = None
        self.masked.run(self._whole)

    @property
    def removed(self) -> float:
        """Share of the parameters that are gone."""
        if self._pruning is None:
            return 0.0
        left = sum(p.numel() for p in self.masked.model.parameters())
        return 1 - left / sum(p.numel() for p in self._whole.parameters())

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        alive = self.alive or {}
        return {f"{PREFIX}{name}": keep.to(torch.uint8) for name, keep in alive.items()}

    def recall(self, saved: Mapping[str, Tensor]) -> None:
        """Cuts a fresh network down to what a saved state had."""
        if f"{PREFIX}{Axis.HIDDEN}" in saved:
            self.shrink({axis.value: saved[f"{PREFIX}{axis}"].bool() for axis in UNIT_AXES})

    def _weights(self) -> dict[str, Tensor]:
        """Weights that are left, as those of a whole network, on the CPU."""
        present = {n: p.detach().cpu() for n, p in self.masked.model.named_parameters()}
        if self._pruning is not None:
            for name, (_, spec, layer) in self._pruning.tensors().items():
                present[name] = _unfold(present[name], self._pruning, spec, layer)
        return self._full(present)

    def _full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the present network's names, at full size and by the whole one's names."""
        pruning = self._pruning
        if pruning is None:
            return dict(tensors)
        return {
            source: _spread(tensors[name], pruning, spec, layer)
            for name, (source, spec, layer) in pruning.tensors().items()
            if name in tensors
        }

    def _hand_over(
        self, optimizer: torch.optim.Optimizer, small: nn.Module, pruning: Pruning
    ) -> None:
        """Lets the optimizer go on, with Adam's moments, in a network that follows the present."""
        named = dict(self.masked.model.named_parameters())
        states = {n: optimizer.state.pop(p) for n, p in named.items() if p in optimizer.state}
        moments = {
            key: self._full({name: state[key].cpu() for name, state in states.items()})
            for key in MOMENTS
        }
        steps = [state["step"] for state in states.values()]  # all the same
        for name, (source, spec, layer) in pruning.tensors().items():
            parameter = small.get_parameter(name)
            if source in moments[MOMENTS[0]]:
                optimizer.state[parameter] = {
                    "step": steps[0].clone(),
                    **{
                        key: cut(full[source], pruning, spec, layer).to(parameter.device)
                        for key, full in moments.items()
                    },
                }
        gone = set(named.values())
        for group in optimizer.param_groups:
            if gone & set(group["params"]):
                group["params"] = [p for p in small.parameters() if p.requires_grad]


def _all(keep: Keep) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in keep.items()}


def _spread(small: Tensor, pruning: Pruning, spec: TensorSpec, layer: int | None) -> Tensor:
    """Kept entries in their places, zeros in the others: `cut` backwards."""
    for index, dim in enumerate(spec.dims):
        shape = [*small.shape]
        shape[index] = dim.size
        small = torch.zeros(shape).index_copy(index, pruning.entries(dim, layer), small)
    return small


def _unfold(weight: Tensor, pruning: Pruning, spec: TensorSpec, layer: int | None) -> Tensor:
    """What `Pruning.fold`, which is affine in every entry, made this of."""
    shift = pruning.fold(torch.zeros_like(weight), spec, layer)
    return (weight - shift) / (pruning.fold(torch.ones_like(weight), spec, layer) - shift)
