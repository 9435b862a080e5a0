"""SHRINK: units that the masks have given up leave the network while it is still searched.

Steps then get faster as the network gets smaller (iterative pruning, as in VTrans,
arXiv:2406.05276). The network is cut by the rules of export, so that it computes what it
computed with those units at zero; masks, budget and allocation keep their full size. At the
end of the search it is whole again, with zeros where units went, and no later stage knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from llm_vtrans.allocation import PrunePlan, allocate
from llm_vtrans.attachment import MaskedModel
from llm_vtrans.budget import complete
from llm_vtrans.distillation import recompute
from llm_vtrans.errors import UserError
from llm_vtrans.export import Pruning, export_config
from llm_vtrans.families.base import UNIT_AXES, UNIT_AXIS, Axis, Sublayer, TensorSpec
from llm_vtrans.loading import Source
from llm_vtrans.masks import VIBMasks, keep_probability
from llm_vtrans.problem import Problem

SHARPNESS = 10.0  # of the keep probability at the end of the search
GIVEN_UP = 0.01  # keep probability from which a unit does not come back
NEVER = 20.0  # `log_var` of a unit that went: no rank is lower
PREFIX = "alive."  # of tensors in a saved state
MOMENTS = ("exp_avg", "exp_avg_sq")

Keep = Mapping[str, Tensor]


@dataclass
class Shrinker:
    """Takes units out of a network whose weights are trained, and puts it back to full size.

    Attributes:
        masked: the network, with a teacher of its own.
        source: gives family and config.
        problem: budget and layout; what meets it now does not go.
        every: steps between two looks at the masks.
        recomputes: as `Distillation`.
        alive: units that are left, as `PrunePlan.keep`; None while all are.
    """

    masked: MaskedModel
    source: Source
    problem: Problem
    every: int
    recomputes: bool = False
    alive: Keep | None = None
    _whole: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._whole = self.masked.model

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
        found = {name: keep_probability(a.detach().cpu(), SHARPNESS) > GIVEN_UP
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
        old, weights = self.masked.model, self.weights()
        pruning = self._pruning(alive)
        small = self._build(pruning)
        for name, (source, spec, layer) in pruning.tensors().items():
            weight = weights[source]
            parameter = small.get_parameter(name)
            parameter.copy_(pruning.fold(_cut(weight, pruning, spec, layer), spec, layer))
            parameter.requires_grad_(self._whole.get_parameter(source).requires_grad)
        moments = {} if optimizer is None else self._moments(optimizer)
        self.alive = alive
        tensors = pruning.tensors()
        self.masked.attach(
            small, {name: (spec, layer) for name, (_, spec, layer) in tensors.items()},
            {name: keep.to(next(small.parameters()).device) for name, keep in alive.items()},
        )  # fmt: skip
        if optimizer is not None:
            self._hand_over(optimizer, old, moments, pruning)

    @torch.no_grad()
    def expand(self) -> None:
        """Makes the network whole again."""
        if self.alive is None:
            return
        for name, weight in self.weights().items():
            self._whole.get_parameter(name).copy_(weight)
        self.alive = None
        self.masked.run(self._whole)

    @property
    def removed(self) -> float:
        """Share of the parameters that are gone."""
        if self.alive is None:
            return 0.0
        left = sum(p.numel() for p in self.masked.model.parameters())
        return 1 - left / sum(p.numel() for p in self._whole.parameters())

    def weights(self) -> dict[str, Tensor]:
        """All weights at full size, on the CPU, zeros where units are gone."""
        return self._full({n: p.detach() for n, p in self.masked.model.named_parameters()}, True)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        alive = self.alive or {}
        return {f"{PREFIX}{name}": keep.to(torch.uint8) for name, keep in alive.items()}

    def recall(self, saved: Mapping[str, Tensor]) -> None:
        """Cuts a fresh network down to what a saved state had."""
        if f"{PREFIX}{Axis.HIDDEN}" in saved:
            self.shrink({axis.value: saved[f"{PREFIX}{axis}"].bool() for axis in UNIT_AXES})

    def _pruning(self, keep: Keep) -> Pruning:
        ones = {name: torch.ones(tensor.shape) for name, tensor in keep.items()}
        gate = {**ones, "layers": torch.ones(self.problem.architecture.num_layers, len(Sublayer))}
        return Pruning(self.source.checkpoint, self.problem.architecture, PrunePlan(keep, gate))

    def _build(self, pruning: Pruning) -> Any:
        """The per-layer network of a shape, as its checkpoint would load."""
        written = export_config(pruning, self.source.family, self.source.config, is_uniform=False)
        config = CONFIG_MAPPING[written["model_type"]].from_dict({**written, "dtype": "float32"})
        whole: Any = self._whole
        config._attn_implementation = whole.config._attn_implementation
        built = self.source.auto_class.from_config(config, trust_remote_code=False)
        built = built.float().to(next(whole.parameters()).device).train(whole.training)
        if self.recomputes:
            recompute(built)
        return built

    def _full(self, tensors: Mapping[str, Tensor], unfolds: bool) -> dict[str, Tensor]:
        """Tensors of the present network, by its names, at full size and by full names."""
        architecture = self.problem.architecture
        if self.alive is None:
            return {n: tensors[n].cpu() for n in architecture.named_tensors() if n in tensors}
        pruning = self._pruning(self.alive)
        full = {
            name: torch.zeros(spec.shape)
            for name, (spec, _) in architecture.named_tensors().items()
        }
        for name, (source, spec, layer) in pruning.tensors().items():
            if name not in tensors:
                del full[source]
                continue
            small = tensors[name].cpu()
            if unfolds:
                shift = pruning.fold(torch.zeros_like(small), spec, layer)
                small = (small - shift) / (
                    pruning.fold(torch.ones_like(small), spec, layer) - shift
                )
            full[source] = _spread(small, pruning, spec, layer)
        return full

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Adam's moments of the present network at full size."""
        named = dict(self.masked.model.named_parameters())
        return {
            key: self._full(
                {n: optimizer.state[p][key] for n, p in named.items() if p in optimizer.state},
                False,
            )
            for key in MOMENTS
        }

    def _hand_over(
        self,
        optimizer: torch.optim.Optimizer,
        old: nn.Module,
        moments: Mapping[str, Mapping[str, Tensor]],
        pruning: Pruning,
    ) -> None:
        """Lets the optimizer go on with the new network's parameters."""
        gone = set(old.parameters())
        steps = [optimizer.state[p]["step"] for p in gone if p in optimizer.state]
        for name, (source, spec, layer) in pruning.tensors().items():
            parameter = self.masked.model.get_parameter(name)
            if steps and source in moments[MOMENTS[0]]:
                cut = {
                    key: _cut(moments[key][source], pruning, spec, layer).to(parameter.device)
                    for key in MOMENTS
                }
                optimizer.state[parameter] = {"step": steps[0].clone(), **cut}
        for group in optimizer.param_groups:
            if gone & set(group["params"]):
                new = self.masked.model.parameters()
                group["params"] = [parameter for parameter in new if parameter.requires_grad]
        for parameter in gone:
            optimizer.state.pop(parameter, None)


def _all(keep: Keep) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in keep.items()}


def _cut(weight: Tensor, pruning: Pruning, spec: TensorSpec, layer: int | None) -> Tensor:
    """Entries of kept units."""
    for index, dim in enumerate(spec.dims):
        weight = weight.index_select(index, pruning.entries(dim, layer))
    return weight


def _spread(small: Tensor, pruning: Pruning, spec: TensorSpec, layer: int | None) -> Tensor:
    """Kept entries in their places, zeros in the others: `_cut` backwards."""
    for index, dim in enumerate(spec.dims):
        shape = [*small.shape]
        shape[index] = dim.size
        small = torch.zeros(shape).index_copy(index, pruning.entries(dim, layer), small)
    return small
