"""PCA truncation: the weakest principal directions of the residual stream go, nothing else.

Principal component analysis under one rotation for the whole network (SliceGPT,
arXiv:2401.15024, section 3, with one matrix Q in place of one per layer): heads and FFN
units stay whole, and the network needs no extra matrices.
"""

from __future__ import annotations

import torch

from eval.baselines.network import Importances, Network
from llm_vtrans.families import Axis


def importance(network: Network, seed: int) -> Importances:
    """Directions in the order of the rotated basis, strongest first."""
    size = network.architecture.num_units[Axis.HIDDEN]
    return {Axis.HIDDEN.value: torch.arange(size, 0, -1, dtype=torch.float64)}
