"""The batch scripts under a real SLURM: two nodes, two ranks, a time limit, a cancellation."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.test_resume import hashes, saved_step
from tests.runs import copy_inputs, flags, write_inputs
from tests.slurm.cluster import PROGRAMS, Cluster, wait_for

SCRIPT = "launch/slurm/prune_multi_node.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")
NUM_STEPS = 40
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)}: tests/slurm/setup.sh installs them"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of this test run as root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def submit(cluster: Cluster, folder: Path, *options: str, num_steps: int = NUM_STEPS) -> str:
    """Submits the multi-node script on a tiny model; returns the job's number."""
    arguments = flags(folder, "--shard-size", "10KB", "--save-every", "5", samples=4 * num_steps)
    return cluster(
        "sbatch", "--parsable", f"--output={folder}/job.out", *TWO_NODES, *options, SCRIPT,
        *arguments, PYTHON=sys.executable, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def log(folder: Path) -> str:
    path = folder / "job.out"
    return path.read_text() if path.is_file() else ""


def wait_for_state(cluster: Cluster, number: str, state: str, folder: Path) -> None:
    ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

    def is_there() -> bool:
        found = cluster.job(number)["JobState"]
        if found != state and found in ends:  # told whole: an assertion would cut the logs
            pytest.fail(f"{found}\n{log(folder)}\n{cluster.log()}")
        return found == state

    wait_for(f"{state} of job {number}", is_there)


def ranks(folder: Path) -> list[int]:
    """Processes of prune.py that write into the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if words[1:2] == [b"llm_vtrans/prune.py"] and str(folder / "out").encode() in words:
            found.append(int(path.parent.name))
    return found


def has_heard(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process will receive a signal once it goes on, or has and is gone.

    SLURM's daemon lets a stopped process go on by itself when it sends a signal.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("uninterrupted"), 120)
    number = submit(cluster, folder)
    wait_for_state(cluster, number, "COMPLETED", folder)
    return folder


@pytest.fixture
def work(uninterrupted: Path, tmp_path: Path) -> Path:
    return copy_inputs(uninterrupted, tmp_path)


def test_two_nodes_finish(uninterrupted: Path) -> None:
    assert (uninterrupted / "out" / "vtrans.json").is_file()
    assert "on 2 rank(s)" in log(uninterrupted)


def test_time_limit_requeues_and_resumes(cluster: Cluster, uninterrupted: Path, work: Path) -> None:
    """The limit comes near in the middle of training, however fast this machine is.

    So the ranks are held there, the limit is shortened to a minute or two, and they go on when
    SLURM has sent its signal.
    """
    number = submit(cluster, work, "--time=60", "--signal=USR1@90")
    wait_for("a saved state", lambda: saved_step(work) > 0)
    stopped = ranks(work)
    assert len(stopped) == 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    cluster("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 2}")
    try:
        wait_for("the signal", lambda: all(has_heard(pid, signal.SIGUSR1) for pid in stopped))
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    wait_for("the requeue", lambda: cluster.job(number)["Restarts"] != "0")
    assert "stopped by SIGUSR1; --resume continues" in log(work)
    assert 0 < saved_step(work) < NUM_STEPS
    # SLURM holds a requeued job back for two minutes, but a few seconds are enough: a node refuses
    # one that starts in the second in which it ended ("Job credential revoked").
    wait_for("the queue", lambda: cluster.job(number)["JobState"] != "COMPLETING")
    cluster("scontrol", "update", f"JobId={number}", "StartTime=now+5", "TimeLimit=10")
    wait_for_state(cluster, number, "COMPLETED", work)
    assert "resumed after step" in log(work)
    assert hashes(work) == hashes(uninterrupted)


@pytest.mark.slow
def test_cancellation_leaves_a_whole_state(
    cluster: Cluster, uninterrupted: Path, work: Path
) -> None:
    number = submit(cluster, work)
    wait_for("a saved state", lambda: saved_step(work) > 0)
    cluster("scancel", number)
    wait_for_state(cluster, number, "CANCELLED", work)
    wait_for("the ranks to go", lambda: not ranks(work))
    assert 0 < saved_step(work) < NUM_STEPS  # readable and whole
    assert not (work / "out" / "vtrans.json").exists()
    again = submit(cluster, work)
    wait_for_state(cluster, again, "COMPLETED", work)
    assert hashes(work) == hashes(uninterrupted)
