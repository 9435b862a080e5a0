"""A network without some units, as one of the library's per-layer layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.families.base import Architecture, Axis, Sublayer, TensorSpec
from llm_vtrans.loading.shaped import empty_network, shaped_config
from llm_vtrans.loading.source import Source
from llm_vtrans.loading.widened import widen_where_slow
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.training.distillation import recompute

Keep = Mapping[str, Tensor]


def bound(keep: Keep, source: Source, architecture: Architecture) -> Pruning:
    """A plan of these units with gates of one.

    Args:
        keep: booleans, `hidden (d,)`, `heads (L, G)`, `ffn (L, I)`.
        source: the dense checkpoint.
        architecture: its table, after rotation if there is one.
    """
    ones = {name: torch.ones(tensor.shape) for name, tensor in keep.items()}
    gate = {**ones, "layers": torch.ones(architecture.num_layers, len(Sublayer))}
    return Pruning(source.checkpoint, architecture, PrunePlan(keep, gate))


def smaller_network(pruning: Pruning, source: Source, whole: Any, recomputes: bool) -> Any:
    """The per-layer network of a plan's shape, as its checkpoint would load, with any weights.

    Args:
        pruning: the plan.
        source: gives family and config.
        whole: the network it comes from, of whose dtype, device and mode it is.
        recomputes: as `Distillation`.
    """
    shape = pruning.plan.shape
    config = shaped_config(
        source.family, source.config, pruning.architecture, shape, is_uniform=False
    )
    built = empty_network(source, config, whole.dtype, whole.device).train(whole.training)
    if recomputes:
        recompute(built)
    return built


def cut(weight: Tensor, pruning: Pruning, spec: TensorSpec, layer: int | None) -> Tensor:
    """Entries of kept units."""
    for index, dim in enumerate(spec.dims):
        weight = weight.index_select(index, pruning.entries(dim, layer).to(weight.device))
    return weight


def attach(masked: MaskedModel, small: nn.Module, pruning: Pruning) -> None:
    """Hooks gates onto a network of a plan's units and makes it the one that is run."""
    tensors = {name: (spec, layer) for name, (_, spec, layer) in pruning.tensors().items()}
    device = next(small.parameters()).device
    alive = {name: keep.to(device) for name, keep in pruning.plan.keep.items()}
    masked.attach(small, tensors, alive)


@torch.no_grad()
def narrow(masked: MaskedModel, source: Source, plan: PrunePlan, recomputes: bool = False) -> None:
    """Lets a masked network of frozen weights run without heads, FFN units and layers that went.

    It computes what it did with gates of zero. The whole one stays beside it as its teacher.
    Hidden dimensions stay: what is tuned reads and writes all of them.

    Args:
        masked: the network; it is whole.
        source: the dense checkpoint.
        plan: what stays.
        recomputes: as `Distillation`.
    """
    hidden = torch.ones_like(plan.keep[Axis.HIDDEN])
    keep = {**plan.keep, Axis.HIDDEN.value: hidden}
    pruning = bound(keep, source, masked.architecture)
    small: nn.Module = smaller_network(pruning, source, masked.model, recomputes)
    small.requires_grad_(False)
    for name, (whole, spec, layer) in pruning.tensors().items():
        small.get_parameter(name).copy_(
            cut(masked.model.get_parameter(whole), pruning, spec, layer)
        )
    widen_where_slow(small, masked.model.device)
    attach(masked, small, pruning)
