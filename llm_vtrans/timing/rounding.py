"""`--round-to auto`: which multiples of a matrix's width matter on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_vtrans.timing.latency import median_ms
from llm_vtrans.timing.remembered import remembered

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTH, NUM_TOKENS = 1024, 128
SLACK = 1.05  # a smaller multiple that is nearly as fast keeps more choice


def best_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """The smallest multiple of which widths are as fast for their size as any.

    Args:
        device: to measure on.
        dtype: of the matrices.
    """

    def measure() -> int:
        cost = {multiple: _ms_per_column(multiple, device, dtype) for multiple in MULTIPLES}
        least = min(cost.values())
        return next(m for m in MULTIPLES if cost[m] <= SLACK * least)

    return int(remembered("multiple", [WIDTH, NUM_TOKENS], device, dtype, measure))


def _ms_per_column(multiple: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of products with a matrix that has such a width on either side.

    Odd times the multiple, so that none is a multiple of the next one as well.
    """
    middle = WIDTH // multiple
    widths = [multiple * (middle + shift) for shift in (-1, 1, 3)] if middle > 1 else [multiple]
    tokens = torch.randn(NUM_TOKENS, WIDTH, device=device, dtype=dtype)

    def passing(width: int) -> Callable[[], Tensor]:
        into = torch.randn(WIDTH, width, device=device, dtype=dtype)
        back = torch.randn(width, WIDTH, device=device, dtype=dtype)
        return lambda: tokens @ into @ back

    return sum(median_ms(passing(w), tokens.is_cuda) for w in widths) / sum(widths)
