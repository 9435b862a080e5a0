"""Random units: the floor that every selection has to beat."""

from __future__ import annotations

import torch

from eval.baselines.network import Importances, Network, zeros
from llm_vtrans.families.base import UNIT_AXES


def importance(network: Network, seed: int) -> Importances:
    """An independent uniform draw for every unit."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(empty.shape, generator=generator, dtype=torch.float64)
        for name, empty in zeros(network.architecture, *UNIT_AXES).items()
    }
