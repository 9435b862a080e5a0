"""When training states are saved: at fixed steps, or as often as costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

STEPS = 100  # between two looks at the clock
SHARE = 0.02  # of the time goes into saving at most


class SavePace:
    """Decides at which steps of a stage its state is saved.

    Args:
        every: steps between two states; 0 for as many as keep saving cheap: a state of a large
            model takes seconds, and so does the training that it may save.
        clock: seconds.
    """

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter):
        self._every, self._clock = every, clock
        self._saved = clock()
        self._took = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the state after a step is to be saved."""
        if self._every:
            return step % self._every == 0
        passed = self._clock() - self._saved
        return step % STEPS == 0 and self._took <= SHARE * passed

    def save(self, work: Callable[[], None]) -> None:
        """Saves, and remembers what that costs."""
        start = self._clock()
        work()
        self._saved = self._clock()
        self._took = self._saved - start
