"""LLM-Pruner: first-order Taylor importance, with the first and last layers protected.

LLM-Pruner (arXiv:2305.11627): removing weight k changes the loss by about
`|dL/dW_k * W_k|` (equation 4, element-wise, its first-order term), summed over the group of
coupled weights (section 3.2, "summation").
"""

from __future__ import annotations

from math import ceil

import torch.nn.functional as F
from torch import Tensor

from eval.baselines.network import Importances, Network, sum_over_groups
from eval.baselines.ranking import uniform_ranks
from llm_vtrans.families import Axis

# The authors prune layers 4 to 29 of LLaMA-7B's 32; here the same shares, rounded up.
PROTECTED_FIRST, PROTECTED_LAST = 4 / 32, 2 / 32


def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """`|dL/dW * W|` for each weight (equation 4, first order)."""
    return (weight * gradient).abs()


def importance(network: Network, seed: int) -> Importances:
    """Saliencies from the gradient of the language-model loss over all calibration windows."""
    model, windows = network.model, network.windows
    model.requires_grad_(True)
    for batch in network.batches:
        logits = network.forward(batch)[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        (loss * len(batch) / len(windows)).backward()

    def of(name: str) -> Tensor:
        parameter = model.get_parameter(name)
        assert parameter.grad is not None, name
        return saliency(parameter.detach(), parameter.grad)

    totals = sum_over_groups(network.architecture, of)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return totals


def scores(importances: Importances, num_layers: int) -> list[dict[str, Tensor]]:
    """The same share of each layer, once with the protected layers at the top and once without.

    Protection suits the 20% of the paper; where it would leave nothing of the other layers,
    the second is better. Calibration loss picks one.
    """
    (free,) = uniform_ranks(importances, num_layers)
    first, last = ceil(PROTECTED_FIRST * num_layers), ceil(PROTECTED_LAST * num_layers)
    rows = [*range(first), *range(num_layers - last, num_layers)]
    protected = dict(free)
    for axis in (Axis.HEADS.value, Axis.FFN.value):
        if axis in free:
            protected[axis] = free[axis].clone()
            protected[axis][rows] = 1 - 1e-3 * (1 - free[axis][rows])  # above every other rank
    return [protected, free]
