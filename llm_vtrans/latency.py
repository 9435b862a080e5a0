"""How long a forward pass takes: dense against pruned, on the run's own device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

MAX_PASSES, MAX_SECONDS = 9, 3.0  # whichever is first; one pass at least


@torch.no_grad()
def forward_ms(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Median milliseconds of a forward pass after one to warm up.

    Args:
        model: in evaluation mode, on one device.
        inputs: of a pass, on that device.
    """
    is_cuda = next(iter(inputs.values())).is_cuda
    times: list[float] = []
    model(**inputs)
    while not times or (len(times) < MAX_PASSES and sum(times) < MAX_SECONDS):
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * median(times)
