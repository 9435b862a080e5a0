"""How long a pass takes: dense against pruned, on the run's own device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.errors import UserError

MIN_PASSES, MAX_PASSES, MAX_SECONDS = 3, 25, 3.0  # the least number in any case
BLOCK_SIZE, BLOCK_SECONDS = 10, 0.5  # measurements of which a median is taken, the least of both
MIN_BLOCKS, MAX_BLOCKS_SECONDS = 3, 20.0  # of which a mean is taken


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

    def milliseconds(self, model: Any, noise: float) -> float:
        """What a network's pass takes, over as long a time as `settled` needs.

        Args:
            model: of the library, in evaluation mode, on one device.
            noise: as `settled` takes it.
        """
        work = self.work(model)
        return 1000 * settled(lambda: _seconds(work, model.device.type == "cuda"), noise)

    def relative(self, model: Any, other: Any, noise: float) -> float:
        """How many times as long as another network's pass a network's takes, in alternation.

        What else runs on a machine slows both. On a shared one the same pass takes half as long
        again within seconds, but as long as its neighbour's to some hundredths.

        Args:
            model: as `milliseconds` takes it.
            other: the same, on the same device.
            noise: as `settled` takes it.
        """
        one, second = self.work(model), self.work(other)
        is_cuda = model.device.type == "cuda"
        return settled(lambda: _seconds(one, is_cuda) / _seconds(second, is_cuda), noise)

    @torch.no_grad()
    def work(self, model: Any) -> Callable[[], None]:
        """A pass, to be repeated as often as it takes.

        Args:
            model: as `milliseconds` takes it.
        """
        tokens = torch.ones(self.batch_size, self.seq_len, dtype=torch.long, device=model.device)
        cache = None
        if self.is_decode:
            cache = model(input_ids=tokens[:, 1:], use_cache=True).past_key_values

        @torch.no_grad()
        def step() -> None:
            if cache is None:
                model(input_ids=tokens)
                return
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step


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
        times.append(_seconds(work, is_cuda))
    return 1000 * median(times)


def settled(measure: Callable[[], float], noise: float) -> float:
    """Mean over blocks of measurements, of each the median, after one to warm up.

    Args:
        measure: takes a measurement.
        noise: share of the mean that its standard error may be; there are as many blocks as that
            takes, or as some time allows.
    """
    measure()
    blocks: list[float] = []
    start = time.perf_counter()
    while len(blocks) < MIN_BLOCKS or (
        stdev(blocks) > noise * fmean(blocks) * sqrt(len(blocks))
        and time.perf_counter() < start + MAX_BLOCKS_SECONDS
    ):
        end = time.perf_counter() + BLOCK_SECONDS
        block: list[float] = []
        while not block or (len(block) < BLOCK_SIZE and time.perf_counter() < end):
            block.append(measure())
        blocks.append(median(block))
    return fmean(blocks)


def _seconds(work: Callable[[], object], is_cuda: bool) -> float:
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
