"""Being asked to go: SIGTERM or SIGUSR1 ends a run so that `--resume` continues it.

Schedulers send one of them some time before they kill. During training the step is finished
and the state saved first; elsewhere there is nothing to save that is not on disk already.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llm_vtrans.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun, accelerate launch
AGAIN = 0.05  # seconds after which a signal is sent again that came where nothing can be raised
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Preemption:
    """Context manager that listens to the signals.

    Attributes:
        received: name of the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._is_agreed = False
        self._is_deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self._vote: Tensor | None = None
        self._again: threading.Timer | None = None

    def __enter__(self) -> Preemption:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._send_again
        if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
            # A launcher that was killed ends nobody: the kernel does it.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._unraisable
        if self._again is not None:
            self._again.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        is_first, self.received = self.received is None, signal.Signals(number).name
        if is_first:
            self.check()

    def _send_again(self, unraisable: Any) -> None:
        """While an object is finalised an exception ends nothing: Python would only print it."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(unraisable.exc_value, Preempted) and self.received is not None:
            number, self.received = signal.Signals[self.received], None
        else:
            self._unraisable(unraisable)
            return
        self._again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        self._again.daemon = True
        self._again.start()

    @contextmanager
    def deferred(self, accelerator: Accelerator) -> Iterator[None]:
        """Signals only leave their name here; `agreed` tells of them between two steps.

        The ranks leave together, and know of a signal that one of them had in the last step.
        """
        self._is_deferred = True
        try:
            yield
            self.agreed(accelerator)
            accelerator.wait_for_everyone()
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Ends the run if a signal came and may act now.

        Raises:
            Preempted: it did.
        """
        if self.received is not None and not self._is_deferred:
            raise Preempted(f"stopped by {self.received}; --resume continues", self._is_agreed)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked to go, the same answer on every rank.

        Every rank calls it after each step. With several ranks it tells of the step before, so
        that the device never waits for the answer.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        asked = torch.tensor(float(self.received is not None), device=accelerator.device)
        last, self._vote = self._vote, accelerator.reduce(asked, "sum")
        self._is_agreed = last is not None and last.item() > 0
        if self._is_agreed and self.received is None:
            self.received = "a signal to another rank"
        return self._is_agreed
