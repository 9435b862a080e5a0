"""How long a pass takes: dense against pruned, on the run's own device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.errors import UserError

MIN_PASSES, MAX_PASSES, MAX_SECONDS = 3, 25, 3.0  # the least number in any case


@dataclass(frozen=True)
class Pass:
    """What is timed.

    Attributes:
        is_decode: one new token for each sequence, its context in the cache; else a whole
            forward pass.
        batch_size: sequences.
        seq_len: tokens in a sequence, the new one counted.
    """

    is_decode: bool
    batch_size: int
    seq_len: int

    @classmethod
    def parse(cls, text: str | None, seq_len: int) -> Pass:
        """Reads `--latency-shape`.

        Args:
            text: `prefill:BxS`, `decode:B`, or None for one sequence.
            seq_len: where the text names none.

        Raises:
            UserError: it is something else.
        """
        found = re.fullmatch(
            r"(?:prefill:(\d+)x(\d+)|decode:(\d+))", text or f"prefill:1x{seq_len}"
        )
        sizes = [int(size) for size in found.groups() if size] if found else [0]
        if not all(sizes):
            raise UserError(f"--latency-shape {text!r}: expected prefill:BxS or decode:B")
        is_decode = len(sizes) == 1
        return cls(is_decode, sizes[0], seq_len if is_decode else sizes[1])

    def __str__(self) -> str:
        if self.is_decode:
            return f"decode:{self.batch_size} at token {self.seq_len}"
        return f"prefill:{self.batch_size}x{self.seq_len}"

    @torch.no_grad()
    def milliseconds(self, model: Any) -> float:
        """Median over some passes after one to warm up.

        Args:
            model: of the library, in evaluation mode, on one device.
        """
        tokens = torch.ones(self.batch_size, self.seq_len, dtype=torch.long, device=model.device)
        if not self.is_decode:
            return forward_ms(model, {"input_ids": tokens})
        cache = model(input_ids=tokens[:, 1:], use_cache=True).past_key_values

        def step() -> None:
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return median_ms(step, tokens.is_cuda)


@torch.no_grad()
def forward_ms(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """Median milliseconds of a forward pass after one to warm up.

    Args:
        model: in evaluation mode, on one device.
        inputs: of a pass, on that device.
    """
    return median_ms(lambda: model(**inputs), next(iter(inputs.values())).is_cuda)


def median_ms(work: Callable[[], object], is_cuda: bool) -> float:
    """Median milliseconds of a piece of work after one run to warm up, device work included."""
    times: list[float] = []
    work()
    while len(times) < MIN_PASSES or (len(times) < MAX_PASSES and sum(times) < MAX_SECONDS):
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * median(times)
