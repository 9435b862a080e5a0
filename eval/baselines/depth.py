"""ShortGPT: whole layers go, those first that change the residual stream least.

ShortGPT (arXiv:2403.03853, equation 1): block influence of layer i is
`1 - E_t[cos(X_i,t, X_i+1,t)]` between a layer's input and output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.baselines.network import Importances, Network
from llm_vtrans.masking.hooks import removed_after


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """Mean over tokens of one minus the cosine (equation 1), shape `()`.

    Args:
        before: the layer's input `(..., d)`.
        after: its output `(..., d)`.
    """
    return 1 - F.cosine_similarity(before.double(), after.double(), dim=-1).mean()


@torch.no_grad()
def importance(network: Network, seed: int) -> Importances:
    """Block influence of every layer as `layers (L, 1)`."""
    architecture = network.architecture
    total = torch.zeros(architecture.num_layers, 1, dtype=torch.float64)

    def observe(layer: int, share: float) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            total[layer] += share * float(block_influence(args[0], after))

        return hook

    prefix = next(spec.name for spec in architecture.tensors if spec.sublayer).split(".{}.")[0]
    layers = network.model.get_submodule(prefix)
    for batch in network.batches:
        share = len(batch) / len(network.windows)
        handles = [
            layers.get_submodule(str(i)).register_forward_hook(observe(i, share))
            for i in range(architecture.num_layers)
        ]
        with removed_after(handles):
            network.forward(batch)
    return {"layers": total}
