"""Which rank tells of an error."""

import socket
from collections.abc import Callable

import pytest

from llm_vtrans.commands import command
from llm_vtrans.commands.command import PREEMPTED, USER_ERROR, run_command
from llm_vtrans.errors import Preempted, UserError


def failing(error: BaseException) -> Callable[[list[str]], None]:
    def fail(_: list[str]) -> None:
        raise error

    return fail


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command, "PATIENCE", 0.1)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)


@pytest.mark.usefixtures("rank_one")
def test_a_rank_that_failed_alone_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as rank_zero:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(rank_zero.getsockname()[1]))
        assert run_command(failing(UserError("a file is gone")), []) == USER_ERROR
    assert capsys.readouterr().err == "error: rank 1: a file is gone\n"
    assert run_command(failing(UserError("a file is gone")), []) == USER_ERROR
    assert not capsys.readouterr().err  # rank zero has ended, too, and told of it


@pytest.mark.usefixtures("rank_one")
def test_a_mistake_that_all_ranks_see_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Here before they have met."""
    assert run_command(failing(UserError("no such model")), []) == USER_ERROR
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("rank_one")
def test_ranks_that_leave_together_tell_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(Preempted("stopped", is_agreed=True)), []) == PREEMPTED
    assert not capsys.readouterr().err
    assert run_command(failing(Preempted("stopped")), []) == PREEMPTED
    assert capsys.readouterr().err == "error: rank 1: stopped\n"
