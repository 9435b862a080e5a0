"""A run that is asked to go saves, says so by its exit status, and continues; kills at random."""

import os
import random
import signal
import time
from pathlib import Path
from subprocess import Popen

import pytest

from llm_vtrans.commands.command import PREEMPTED, USER_ERROR, run_command
from llm_vtrans.prune import prune
from llm_vtrans.record.reporting import METRICS_FILE
from llm_vtrans.training.run_state import STATE_FOLDER
from tests.integration import test_resume
from tests.integration.test_resume import hashes, long_run, metrics, saved_step
from tests.integration.test_two_ranks import TWO_RANKS
from tests.runs import children, finish, flags, start, write_inputs

uninterrupted, work = test_resume.uninterrupted, test_resume.work  # fixtures


def wait_for_step(process: Popen[str], folder: Path, step: int) -> None:
    while saved_step(folder) < step and process.poll() is None:
        time.sleep(0.01)


def wait_for_line(process: Popen[str]) -> None:
    """Waits for the first step that is logged."""
    assert process.stdout is not None and process.stderr is not None
    assert any(line.startswith("step") for line in process.stdout), process.stderr.read()


def test_signal_saves_and_tells(
    uninterrupted: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both signals in turn; what the first saved is not lost when the second comes early."""
    process = start(long_run(work))
    wait_for_step(process, work, 3)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate()
    assert process.returncode == PREEMPTED, errors
    assert "stopped by SIGUSR1; --resume continues" in errors
    first = saved_step(work)
    assert first >= 3

    # `--save-every` is too rare to save anything by itself: the signal does it.
    process = start(long_run(work, "--resume", "--save-every", "1000"))
    wait_for_line(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == PREEMPTED, errors
    assert first < saved_step(work) < test_resume.NUM_STEPS

    assert run_command(prune, long_run(work, "--resume")) == 0
    assert "resumed after step" in capsys.readouterr().out
    assert hashes(work) == hashes(uninterrupted)
    assert metrics(work) == metrics(uninterrupted)


def test_a_finished_run_is_resumed_with_success(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It also clears away what a kill has left of a state that was being removed."""
    before = hashes(uninterrupted)
    state = uninterrupted / "out" / STATE_FOLDER
    state.mkdir()
    (state / METRICS_FILE).touch()
    assert run_command(prune, long_run(uninterrupted, "--resume")) == 0
    assert not state.exists()
    assert "is finished already" in capsys.readouterr().out
    assert hashes(uninterrupted) == before
    assert run_command(prune, long_run(uninterrupted, "--resume", "--seed", "7")) == USER_ERROR


def test_one_rank_of_two_is_asked(tmp_path: Path) -> None:
    """The other rank hears of it and stops after the same step."""
    num_steps = 1000
    folder = write_inputs(tmp_path, 800)
    process = start(flags(folder, "--save-every", "5000", samples=4 * num_steps), *TWO_RANKS)
    wait_for_line(process)
    started = children(process.pid)
    ranks = sorted(pid for pid in started if "prune.py" in _command(pid))
    assert len(ranks) == 2, started
    os.kill(ranks[1], signal.SIGUSR1)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert 0 < saved_step(folder) < num_steps
    assert "stopped by a signal to another rank" in errors  # what rank zero tells


LAUNCHERS = {
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu"),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
}


@pytest.mark.parametrize(
    "launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_nobody_outlives_a_killed_launcher(uninterrupted: Path, work: Path, launcher: str) -> None:
    process = start(long_run(work), *LAUNCHERS[launcher])
    wait_for_step(process, work, 3)
    (child,) = (pid for pid in children(process.pid) if "prune.py" in _command(pid))
    process.kill()
    _, errors = process.communicate()  # ends when the child has closed its side
    assert "stopped by SIGTERM; --resume continues" in errors
    while not _has_ended(child):
        time.sleep(0.01)
    assert 3 <= saved_step(work) < test_resume.NUM_STEPS
    assert run_command(prune, long_run(work, "--resume")) == 0
    assert hashes(work) == hashes(uninterrupted)


def _has_ended(pid: int) -> bool:
    """Whether nothing of a process is left to run; who collects its status is another matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_kills", [3, 20])
def test_kills_at_random_moments(uninterrupted: Path, work: Path, num_kills: int) -> None:
    """kill -9, every second one while a state is being written; the masks come out the same.

    A state is written after every step here, so that kills inside a save are common; a moment
    is drawn after the first new state, as a kill before it changes nothing.
    """
    draw = random.Random(0)
    inside = 0
    for number in range(num_kills):
        done = saved_step(work)
        process = start(long_run(work, "--resume"))
        wait_for_step(process, work, done + 1)
        if number % 2:
            partial = "out/state/.training.safetensors.partial-*"
            while process.poll() is None and not any(work.glob(partial)):
                pass
        else:
            time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before it was killed"
        inside += any((work / "out" / "state").glob(".training.safetensors.partial-*"))
        assert saved_step(work) > done  # what is there is whole
    finish(long_run(work, "--resume"))
    print(f"{num_kills} kills, {inside} of them inside a save")
    assert hashes(work) == hashes(uninterrupted)
    assert metrics(work) == metrics(uninterrupted)
