"""Hooks that last as long as a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks when the block ends, however it ends.

    Args:
        handles: what registering the hooks gave.
    """
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
