"""SIGKILL, SIGTERM and SIGINT in every phase, on one rank or two: resumed, the result is the same.

No process outlives `forks.LIMIT` seconds, and no half checkpoint is there to be loaded.
"""

import random
import signal
from pathlib import Path
from shutil import copyfile, copytree, rmtree
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest

from llm_vtrans.command import INTERRUPTED, PREEMPTED
from llm_vtrans.publishing import QUICK_CHECKS
from llm_vtrans.verification import Subject, verify
from tests.faults.conftest import Tally
from tests.faults.forks import Fork, Moment, fork, fork_ranks
from tests.integration.test_resume import hashes
from tests.runs import flags, write_inputs

PHASES = ("start", "calibration", "load", "rotate", "search", "allocate", "tune", "export", "score")
SIGNALS = (SIGKILL, SIGTERM, SIGINT)
SETTINGS = ("--quiet", "--save-every", "2", "--shard-size", "10KB")
LONGEST_DELAY = 0.3  # seconds into a phase


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and in `out` the result of a run that nothing stopped."""
    folder = write_inputs(tmp_path_factory.mktemp("whole"))
    run = fork("prune", flags(folder, *SETTINGS), folder / "log")
    assert run.status() == 0, run.errors
    return folder


@pytest.fixture
def work(whole: Path, tmp_path: Path) -> Path:
    """The same inputs without a result."""
    copytree(whole / "model", tmp_path / "work" / "model")
    copyfile(whole / "text.txt", tmp_path / "work" / "text.txt")
    return tmp_path / "work"


def draw_moment(draw: random.Random, number: Signals, phase: str, whole: Path) -> Moment:
    """At one of the phase's file operations, or after some time."""
    num = Fork.operations_of(whole / "log")[phase]
    if num and draw.random() < 0.6:
        return Moment(number, phase, operation=draw.randint(1, num))
    return Moment(number, phase, delay=draw.uniform(0, LONGEST_DELAY))


def check_end(run: Fork, moment: Moment | None) -> str | None:
    """The process ended as the signal asks for, or before it came; the line that it told."""
    status, errors = run.status(), run.errors
    if status == 0:
        assert errors == "", errors
        return None
    assert moment is not None, errors
    if status == -moment.number and moment.number in (SIGKILL, SIGTERM):
        is_early = moment.number == SIGTERM and moment.phase == "start"  # nobody listens yet
        assert errors == "" and (is_early or moment.number == SIGKILL), errors
        return None
    assert status == {SIGTERM: PREEMPTED, SIGINT: INTERRUPTED}[moment.number], (status, errors)
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0].removeprefix("error: ")


def check_folder(work: Path) -> None:
    """What can be loaded is whole."""
    out = work / "out"
    if any(out.glob("config.json")) or any(out.glob("model*")):
        assert not any(finding.is_failure for finding in verify(Subject.open(out), QUICK_CHECKS))


def finish(work: Path, whole: Path) -> None:
    """The last run of a chain has the result of one that nothing stopped, and tidied up."""
    assert hashes(work) == hashes(whole)
    assert {path.name for path in work.iterdir()} == {"model", "text.txt", "out"}
    assert not (work / "out" / "state").exists()


def log_of(work: Path) -> Path:
    return work.parent / "log"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]
)
def test_a_stop_in_every_phase(whole: Path, work: Path, tally: Tally, seed: int) -> None:
    """Each run goes on from the one before and is stopped one phase later."""
    draw = random.Random(seed)
    arguments = flags(work, *SETTINGS, "--resume")
    for index, phase in enumerate(PHASES):
        number = SIGNALS[(index + seed) % len(SIGNALS)]
        moment = draw_moment(draw, number, phase, whole)
        run = fork("prune", arguments, log_of(work), moment)
        line = check_end(run, moment)
        check_folder(work)
        tally.survived(f"prune: {number.name}", line)
    assert check_end(fork("prune", arguments, log_of(work)), None) is None
    finish(work, whole)
