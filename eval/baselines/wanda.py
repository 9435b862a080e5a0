"""Wanda-sp: weights times the norm of their inputs, summed over a unit.

Wanda (arXiv:2306.11695, equation 1) scores a weight by `|W_ij| * ||X_j||_2`; Wanda-sp, the
structured form (FLAP, arXiv:2312.11983, section 4.1), averages this over the output side
of `o_proj` and `down_proj` and prunes the same share of heads and FFN units in each layer.
"""

from __future__ import annotations

from torch import Tensor

from eval.baselines.network import (
    Importances,
    Network,
    input_axis,
    output_by_input,
    per_unit,
    zeros,
)
from llm_vtrans.families import Axis
from llm_vtrans.families.base import UNIT_AXES, Stream


def saliency(weight: Tensor, norms: Tensor) -> Tensor:
    """Wanda's equation 1.

    Args:
        weight: `(out, in)`.
        norms: L2 norm of each input feature over all tokens, `(in,)`.

    Returns:
        `|W_ij| * ||X_j||_2`, `(out, in)`.
    """
    return weight.abs() * norms


def importance(network: Network, seed: int) -> Importances:
    """Heads and FFN units from the matrices that write; hidden dimensions from all matrices.

    The paper prunes no hidden dimension. Here one gathers the saliencies of all matrices that
    share it, each divided by its matrix's mean so that none outweighs the others by scale.
    """
    totals = zeros(network.architecture, *UNIT_AXES)
    for name, (spec, layer) in network.matrices().items():
        values = saliency(output_by_input(network.weight(name), spec), network.moments[name].norm)
        axis = input_axis(spec)
        if axis is not None and spec.stream is Stream.WRITES:
            units = network.architecture.num_units[axis]
            totals[axis][layer] += per_unit(values.mean(0), units)
        if spec.dim_of(Axis.HIDDEN) is not None:
            hidden = values.sum(1 if spec.stream is Stream.WRITES else 0)
            totals[Axis.HIDDEN] += hidden / hidden.mean()
    return totals
