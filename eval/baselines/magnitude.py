"""Structured magnitude: the L2 norm of all weights of a unit.

The group criterion `||W||_2` that LLM-Pruner compares itself with (arXiv:2305.11627,
section 4.1, "L2"), after Li et al., *Pruning Filters for Efficient ConvNets*
(arXiv:1608.08710, section 3.1), who sum a filter's absolute weights.
"""

from __future__ import annotations

from eval.baselines.network import Importances, Network, sum_over_groups


def importance(network: Network, seed: int) -> Importances:
    """Root of the sum of squares over every tensor of the group; the seed plays no part."""
    squares = sum_over_groups(network.architecture, lambda name: network.weight(name).square())
    return {name: total.sqrt() for name, total in squares.items()}
