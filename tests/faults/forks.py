"""Commands in processes forked from one that has imported everything, stopped where a test says.

Python with torch takes seconds to start and a fork milliseconds, so many moments can be tried.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Timer
from typing import Any

import torch

# What a command imports late is there before the fork.
import llm_vtrans.scoring.harness  # noqa: F401
import tests.tiny  # noqa: F401
from llm_vtrans.commands.command import run_command
from llm_vtrans.commands.export import export
from llm_vtrans.prune import prune
from llm_vtrans.record.reporting import Reporter
from llm_vtrans.score import run as score

COMMANDS = {"prune": prune, "export": export, "score": score}
LIMIT = 30  # seconds in which a process that was asked to go, or lost its peer, must have ended
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Moment:
    """When a process sends itself a signal.

    Attributes:
        number: the signal.
        phase: as the run's record names it, or the last one; `start` comes before all.
        operation: so many files were opened, renamed or removed in it.
        delay: or so many seconds went by.
    """

    number: signal.Signals
    phase: str = "start"
    operation: int | None = None
    delay: float | None = None


@dataclass
class Fork:
    """A command that runs in a process of its own."""

    process: ForkServerProcess
    log: Path

    def status(self) -> int:
        """Exit status; a process that hangs fails the test."""
        self.process.join(LIMIT)
        is_hanging = self.process.exitcode is None
        if is_hanging:
            self.process.kill()
        assert not is_hanging, f"hung for {LIMIT} s: {self.errors}"
        status = self.process.exitcode
        assert status is not None
        return status

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self.log.with_suffix(".err").read_text()

    @staticmethod
    def operations_of(log: Path) -> Counter[str]:
        """File operations of each phase."""
        return Counter(log.with_suffix(".operations").read_text().split())


def fork(
    command: str,
    arguments: list[str],
    log: Path,
    moment: Moment | None = None,
    setup: Callable[[], None] | None = None,
    **environment: str,
) -> Fork:
    """Starts a command; `log` names the files that take what it tells."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parts = (command, arguments, log, moment, setup, environment)
    process = SERVER.Process(target=_run, args=parts)
    process.start()
    return Fork(process, log)


def fork_ranks(
    arguments: list[str],
    log: Path,
    moments: dict[int, Moment],
    setup: Callable[[], None] | None = None,
    num: int = 2,
) -> list[Fork]:
    """The main job on so many ranks, as SLURM starts them: nothing watches over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        fork(
            "prune", arguments, log.with_name(f"{log.name}-{rank}"), moments.get(rank), setup,
            RANK=str(rank), LOCAL_RANK=str(rank), **size, **where,
        )
        for rank in range(num)
    ]  # fmt: skip


@dataclass
class _Watcher:
    """Follows the phases, counts their file operations and sends the signal."""

    moment: Moment | None
    tally: int
    counts: Counter[str] = field(default_factory=Counter)
    phase: str = ""

    def enter(self, phase: str) -> None:
        self.phase = phase
        moment = self.moment
        if moment is not None and moment.phase == phase and moment.delay is not None:
            timer = Timer(moment.delay, os.kill, (os.getpid(), moment.number))
            timer.daemon = True
            timer.start()

    def audit(self, event: str, _: tuple[Any, ...]) -> None:
        if not (event == "open" or event.startswith(("os.", "shutil."))) or event == "os.kill":
            return
        self.counts[self.phase] += 1
        os.write(self.tally, f"{self.phase}\n".encode())
        moment = self.moment
        if moment is not None and (moment.phase, moment.operation) == (
            self.phase,
            self.counts[self.phase],
        ):
            os.kill(os.getpid(), moment.number)


def _run(
    command: str,
    arguments: list[str],
    log: Path,
    moment: Moment | None,
    setup: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), _NEW), descriptor)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **environment)
    sys.argv = ["llm-vtrans", command, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    gc.freeze()  # what was there before the fork is not walked through, so it stays shared
    if setup is not None:
        setup()
    watcher = _Watcher(moment, os.open(log.with_suffix(".operations"), _NEW))
    _follow(watcher)
    sys.exit(run_command(COMMANDS[command], arguments))


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _follow(watcher: _Watcher) -> None:
    """Lets the watcher know of every phase that begins."""
    phase = Reporter.phase

    @contextmanager
    def followed(self: Reporter, name: str) -> Iterator[None]:
        watcher.enter(name)
        with phase(self, name):
            yield

    Reporter.phase = followed  # type: ignore[method-assign]
    watcher.enter("start")
    sys.addaudithook(watcher.audit)
