"""Everything on a disk whose reads take their time: the result is the same, signals still work."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import pytest

from llm_vtrans.commands.command import PREEMPTED
from tests.faults.conftest import Tally
from tests.faults.forks import Moment, fork, fork_ranks
from tests.integration.test_resume import hashes
from tests.runs import copy_inputs, flags

SETTINGS = ("--quiet", "--shard-size", "10KB")
DELAY = 0.1  # seconds for each read


def run(folder: Path, num_ranks: int = 1) -> None:
    for rank in fork_ranks(flags(folder, *SETTINGS), folder.parent / "log", {}, num=num_ranks):
        assert rank.status() == 0, rank.errors


@pytest.fixture
def fast(finished: Path, tmp_path: Path) -> Path:
    """The inputs on a fast disk."""
    return copy_inputs(finished, tmp_path / "fast")


@pytest.fixture
def slow(fast: Path, tmp_path: Path) -> Iterator[Path]:
    """The same inputs on a slow disk."""
    pytest.importorskip("mfusepy", reason="pip install mfusepy", exc_type=ImportError)
    work, disk = tmp_path / "work", tmp_path / "disk"
    disk.mkdir()
    copy_inputs(fast, work)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("slow_disk.py")), work, disk, str(DELAY)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not disk.is_mount() and server.poll() is None:
        time.sleep(0.05)
    if server.poll() is not None:
        pytest.skip(f"FUSE cannot mount here: {server.communicate()[1][-200:]}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    server.communicate(timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_result_is_the_same(slow: Path, fast: Path, tally: Tally, num_ranks: int) -> None:
    run(fast, num_ranks)
    begin = time.monotonic()
    run(slow, num_ranks)
    assert time.monotonic() - begin > 4 * DELAY  # it was slow
    assert hashes(slow) == hashes(fast)
    tally.survived("slow disk")


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_a_stop_while_it_reads(slow: Path, fast: Path, tally: Tally, number: Signals) -> None:
    moment = Moment(number, "load", delay=DELAY)
    stopped = fork("prune", flags(slow, *SETTINGS), slow.parent / "log", moment)
    assert stopped.status() == (PREEMPTED if number == SIGTERM else -number), stopped.errors
    again = fork("prune", flags(slow, *SETTINGS, "--resume"), slow.parent / "log")
    assert again.status() == 0, again.errors
    run(fast)
    assert hashes(slow) == hashes(fast)
    tally.survived("slow disk")
