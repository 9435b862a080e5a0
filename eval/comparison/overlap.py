"""Calibration text and evaluation text must have no passage in common."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_vtrans.errors import UserError


def check_apart(text: str, windows: Tensor, data: str, calibration: Tensor) -> None:
    """Refuses evaluation windows of which a run of half a window lies in a calibration window.

    A passage of a whole window that both texts contain has, wherever windows are cut in
    either, half a window in one piece; shorter common runs are quotations and boilerplate.

    Args:
        text: name of the evaluation text.
        windows: its tokens `(num_windows, context_length)`.
        data: name of the calibration text.
        calibration: its tokens `(num_windows, seq_len)`.

    Raises:
        UserError: they overlap.
    """
    length = max(1, min(windows.shape[1], calibration.shape[1]) // 2)
    shared = torch.isin(run_hashes(windows, length), run_hashes(calibration, length)).any(dim=1)
    if shared.any():
        raise UserError(
            f"evaluation text {text} and calibration text {data} overlap: {int(shared.sum())} of "
            f"{len(windows)} windows have {length} tokens in a row in common; give --data another "
            "text or --texts other ones"
        )


def run_hashes(windows: Tensor, length: int) -> Tensor:
    """64-bit hashes of every run of `length` tokens, `(num_windows, seq - length + 1)`."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (length,), generator=generator) * 2 + 1
    count = windows.shape[1] - length + 1
    hashes = torch.zeros(len(windows), count, dtype=torch.int64)
    for start, factor in enumerate(factors.tolist()):
        hashes += windows[:, start : start + count] * factor  # wraps around, as a hash may
    return hashes
