"""What the device does in a training step, kernel by kernel."""

from __future__ import annotations

import re

import torch
from torch.profiler import ProfilerActivity, profile

from eval.speed.training import Bench

WARM_UP = 2  # steps
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|::(mm|addmm|bmm|linear)\b|flash|fmha|attention")


def is_product(kernel: str) -> bool:
    """Whether a kernel multiplies matrices, attention counted in."""
    return PRODUCTS.search(kernel) is not None


def step_kernels(
    name: str, batch_size: int, seq_len: int, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Milliseconds by kernel, of a search and of a tune step; by operator where there is no GPU.

    Args:
        name: dense checkpoint.
        batch_size: windows.
        seq_len: tokens in each.
        dtype: to compute in.
    """
    bench = Bench(name, batch_size, seq_len, dtype)
    steps = {"search step": bench.search_step, "tune step": bench.tune_step}
    found = {}
    is_cuda = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    for stage, step in steps.items():
        for _ in range(WARM_UP):
            step()
        with profile(activities=[activity]) as profiler:
            step()
            if is_cuda:
                torch.cuda.synchronize()
        times = {}
        for event in profiler.key_averages():
            if is_cuda and event.device_type.name == "CUDA":
                times[event.key] = event.self_device_time_total / 1e3
            elif not is_cuda and event.self_cpu_time_total > 0:
                times[event.key] = event.self_cpu_time_total / 1e3
        found[stage] = times
    return found
