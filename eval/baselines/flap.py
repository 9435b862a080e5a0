"""FLAP: how much a unit's input fluctuates, global allocation, and bias compensation.

FLAP (arXiv:2312.11983): the weighted input feature variance, WIFV,
`S_j = 1 / (N - 1) * sum_n (X_nj - mean(X_j))^2 * ||W_:j||_2^2`, standardised in each layer so
that one threshold serves heads and FFN units of all layers (its adaptive structure search,
"AL-AM"), and the mean output of what is removed, `B = W (mean(X) * (1 - M))`, put back as a
bias (its baseline bias compensation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.baselines.network import (
    Importances,
    Network,
    input_axis,
    output_by_input,
    zeros,
)
from eval.baselines.ranking import joint_ranks
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.families import Architecture, Axis
from llm_vtrans.families.base import UNIT_AXES, Stream


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    """Weighted input feature variance (WIFV).

    Args:
        weight: `(out, in)`.
        variance: unbiased variance of each input feature, `(in,)`.

    Returns:
        `var(X_j) * ||W_:j||_2^2`, `(in,)`.
    """
    return variance * weight.square().sum(0)


def standardise(metric: Tensor) -> Tensor:
    """Zero mean and unit variance within a layer, so that layers compare."""
    return (metric - metric.mean()) / metric.std().clamp(min=1e-12)


def importance(network: Network, seed: int) -> Importances:
    """Standardised fluctuation: a head's is the mean of its channels', as in the authors' code.

    The paper prunes no hidden dimension. Here one gathers the fluctuations of all matrices that
    read it, each divided by its matrix's mean.
    """
    totals = zeros(network.architecture, *UNIT_AXES)
    for name, (spec, layer) in network.matrices().items():
        axis = input_axis(spec)
        if axis is None:
            continue
        weight = output_by_input(network.weight(name), spec)
        metric = fluctuation(weight, network.moments[name].variance)
        if axis is Axis.HIDDEN:
            totals[axis] += metric / metric.mean()
        elif spec.stream is Stream.WRITES:
            units = network.architecture.num_units[axis]
            totals[axis][layer] += standardise(metric).reshape(units, -1).mean(1)
    return totals


def scores(importances: Importances, num_layers: int) -> list[dict[str, Tensor]]:
    """One order over the heads and FFN units of all layers."""
    return [joint_ranks(importances)]


def num_biases(architecture: Architecture) -> int:
    """Parameters that the compensation may add: a bias to each write that has none."""
    writes = [s for s in architecture.tensors if s.sublayer and s.stream is Stream.WRITES]
    matrices = sum(len(spec.dims) == 2 for spec in writes)
    biases = len(writes) - matrices
    return architecture.num_layers * (matrices - biases) * architecture.num_units[Axis.HIDDEN]


def lost_output(weight: Tensor, mean: Tensor, is_kept: Tensor) -> Tensor:
    """Mean output of the removed inputs: `W (mean(X) * (1 - M))`.

    Args:
        weight: `(out, in)`.
        mean: mean of each input feature, `(in,)`.
        is_kept: bool `(in,)`.

    Returns:
        `(out,)`.
    """
    return weight @ mean.masked_fill(is_kept, 0.0)


@torch.no_grad()
def compensate(network: Network, pruning: Pruning, model: PreTrainedModel) -> int:
    """Adds the compensating bias to every pruned matrix that writes to the stream.

    A stock LLaMA's config has no room for these biases, so the model lives in memory only.

    Args:
        network: the dense network.
        pruning: what was exported.
        model: the exported model, changed in place.

    Returns:
        Number of parameters added.
    """
    hidden = pruning.kept(Axis.HIDDEN, None)
    num_added = 0
    for written, (name, spec, layer) in pruning.tensors().items():
        axis = input_axis(spec)
        if spec.stream is not Stream.WRITES or axis is None or len(spec.dims) != 2:
            continue
        weight = output_by_input(network.weight(name), spec)
        keep = pruning.plan.keep[axis][layer]
        width = weight.shape[1] // len(keep)
        lost = lost_output(weight, network.moments[name].mean, keep.repeat_interleave(width))
        module: Any = model.get_submodule(written.removesuffix(".weight"))
        bias = (pruning.shrunk * lost[hidden]).to(module.weight)
        if module.bias is None:
            module.bias = nn.Parameter(bias)
            num_added += len(bias)
        else:
            module.bias += bias
    return num_added
