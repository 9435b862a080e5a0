"""SIGKILL, SIGTERM and SIGINT in every phase, on one rank or two: resumed, the result is the same.

No process outlives `forks.LIMIT` seconds, and no half checkpoint is there to be loaded.
"""

import json
import os
import random
import time
from datetime import timedelta
from pathlib import Path
from shutil import copyfile, copytree
from signal import SIGINT, SIGKILL, SIGTERM, Signals, default_int_handler, signal

import pytest

from llm_vtrans.commands.command import INTERRUPTED, PREEMPTED, USER_ERROR
from llm_vtrans.distributed import ranks
from llm_vtrans.errors import Preempted, blame
from llm_vtrans.record.verification import Subject, verify
from llm_vtrans.training.preemption import Preemption
from tests.faults.conftest import Tally
from tests.faults.forks import Fork, Moment, fork, fork_ranks
from tests.integration.test_resume import hashes
from tests.runs import QUICK_CHECKS, flags, write_inputs

PHASES = ("start", "calibration", "load", "rotate", "search", "allocate", "tune", "export", "score")
SIGNALS = (SIGKILL, SIGTERM, SIGINT)
SETTINGS = ("--quiet", "--save-every", "2", "--shard-size", "10KB")
LONGEST_DELAY = 0.3  # seconds into a phase


Ranks = dict[int, Moment]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and in `out` the result of a run that nothing stopped."""
    folder = write_inputs(tmp_path_factory.mktemp("whole"))
    run = fork("prune", flags(folder, *SETTINGS), folder / "log")
    assert run.status() == 0, run.errors
    return folder


@pytest.fixture(scope="module")
def whole_of_two(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks."""
    folder = copy_inputs(whole, tmp_path_factory.mktemp("two"))
    for rank in fork_ranks(flags(folder, *SETTINGS), folder / "log", {}):
        assert rank.status() == 0, rank.errors
    return folder


@pytest.fixture
def work(whole: Path, tmp_path: Path) -> Path:
    """The same inputs without a result."""
    return copy_inputs(whole, tmp_path / "work")


def copy_inputs(source: Path, folder: Path) -> Path:
    copytree(source / "model", folder / "model")
    copyfile(source / "text.txt", folder / "text.txt")
    return folder


def draw_moment(draw: random.Random, number: Signals, phase: str, log: Path) -> Moment:
    """At one of the phase's file operations, as counted in `log`, or after some time."""
    num = Fork.operations_of(log)[phase]
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
        moment = draw_moment(draw, number, phase, whole / "log")
        run = fork("prune", arguments, log_of(work), moment)
        line = check_end(run, moment)
        check_folder(work)
        tally.survived(f"prune: {number.name}", line)
    assert check_end(fork("prune", arguments, log_of(work)), None) is None
    finish(work, whole)


def meet_soon() -> None:
    """Shortens how long ranks wait for each other at the start, as the test can't wait so long."""
    ranks.MEETING_TIMEOUT = timedelta(seconds=5)


def check_survivor(run: Fork) -> str | None:
    """A rank that loses its peer ends with one line that says so."""
    status, errors = run.status(), run.errors
    lines = errors.splitlines()
    assert len(lines) <= 1 and status in (0, USER_ERROR, PREEMPTED), (status, errors)
    if status == USER_ERROR:
        assert "another rank has ended" in errors, errors
    return lines[0].removeprefix("error: ") if lines else None


def check_ranks(work: Path, moments: Ranks, tally: Tally) -> None:
    """Starts two ranks, sends the signals, and waits until both have ended as they should."""
    arguments = flags(work, *SETTINGS, "--resume")
    for number, run in enumerate(fork_ranks(arguments, log_of(work), moments, meet_soon)):
        if number in moments and run.status() not in (USER_ERROR, PREEMPTED):
            line = check_end(run, moments[number])
        else:  # untouched, or it lost its peer before its own signal came
            line = check_survivor(run)
        tally.survived("two ranks", line)
    check_folder(work)


def finish_ranks(work: Path, whole: Path) -> None:
    arguments = flags(work, *SETTINGS, "--resume")
    for run in fork_ranks(arguments, log_of(work), {}):
        assert run.status() == 0, run.errors
    finish(work, whole)


def test_one_rank_of_two_is_killed(whole_of_two: Path, work: Path, tally: Tally) -> None:
    """Nothing watches over these ranks: the other one must find out by itself."""
    check_ranks(work, {1: Moment(SIGKILL, "search", operation=5)}, tally)
    check_ranks(work, {0: Moment(SIGKILL, "export", operation=40)}, tally)
    finish_ranks(work, whole_of_two)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(work: Path, tally: Tally, rank: int) -> None:
    """The other one waits for the meeting's timeout, not for the export's."""
    check_ranks(work, {rank: Moment(SIGKILL, "start", operation=1)}, tally)


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_the_rank_that_a_signal_ends_tells_of_it(work: Path, number: Signals) -> None:
    """Nobody else knows why it has gone."""
    arguments = flags(work, *SETTINGS, "--resume")
    moments = {1: Moment(number, "load", operation=3)}
    told = [run.status() and run.errors for run in fork_ranks(arguments, log_of(work), moments)]
    assert str(told[0]).count("another rank has ended") == 1
    assert str(told[1]).startswith("error: rank 1: ") and str(told[1]).count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(10))
def test_ranks_are_stopped(whole_of_two: Path, work: Path, tally: Tally, seed: int) -> None:
    """One or both, in every phase."""
    draw = random.Random(seed)
    for phase in PHASES:
        chosen = draw.choice([(0,), (1,), (0, 1)])
        number = draw.choice(SIGNALS)
        log = whole_of_two / "log-0"
        check_ranks(work, {r: draw_moment(draw, number, phase, log) for r in chosen}, tally)
    finish_ranks(work, whole_of_two)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "number", "seed"),
    [("score", SIGINT, 0), ("export", SIGKILL, 0)]
    + [
        pytest.param(command, number, seed, marks=pytest.mark.slow)
        for command in ("score", "export")
        for number in SIGNALS
        for seed in (1, 2, 3)
    ],
)
def test_other_commands(
    whole: Path, work: Path, tally: Tally, command: str, number: Signals, seed: int
) -> None:
    """Stopped anywhere they leave nothing that looks like a result; --resume is not theirs."""
    result = work / "out"
    arguments = ["--from", str(whole / "out"), "--sparsity", "0.3", "--output", str(result)]
    if command == "score":
        task = f"ppl:{work / 'text.txt'}"
        arguments = ["--model", str(work / "model"), "--tasks", task, "--output", str(result)]
        arguments += ["--context-length", "16", "--limit", "4"]
    delay = random.Random(seed).uniform(0, 1.0)
    run = fork(command, arguments, log_of(work), Moment(number, "start", delay=delay))
    status = run.status()
    assert status in (0, -number, PREEMPTED, INTERRUPTED), run.errors
    lines = [line for line in run.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == (status > 0) and "Traceback" not in run.errors, run.errors
    if status == INTERRUPTED:
        assert lines == ["error: interrupted"]
    if command == "export":
        check_folder(work)
    elif result.exists():
        assert json.loads(result.read_text())["results"]
    tally.survived(f"{command}: {number.name}", lines[0].removeprefix("error: ") if lines else None)


def test_a_signal_is_no_failure_of_what_it_interrupts() -> None:
    """The wrappers that turn any failure of a library into a line let it through."""
    with Preemption(), pytest.raises(Preempted), blame("config.json", "restore it"):
        os.kill(os.getpid(), SIGTERM)


class _SignalsAtItsEnd:
    """Sends its process a signal while it is finalised, where Python lets no exception out."""

    def __init__(self, number: Signals):
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)
        time.sleep(0.01)  # the handler runs here


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_while_an_object_is_finalised_is_not_lost(
    number: Signals, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    handler = signal(SIGINT, default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal(SIGINT, handler))
    with pytest.raises((Preempted, KeyboardInterrupt)) as ended, Preemption():
        _SignalsAtItsEnd(number)
        time.sleep(10)
    assert ended.type is (KeyboardInterrupt if number == SIGINT else Preempted)
    assert capsys.readouterr().err == ""
