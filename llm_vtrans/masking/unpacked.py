"""Rows of tokens that are one sequence each, for the library to take on trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

LOOK = "find_packed_sequence_indices"


@contextmanager
def unpacked() -> Iterator[None]:
    """Keeps the library from looking meanwhile whether a row holds several sequences.

    It reads the answer off positions on the device, so that every forward pass would wait for
    the one before it to end.
    """
    look: Any = getattr(masking_utils, LOOK)
    setattr(masking_utils, LOOK, lambda _: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, look)
