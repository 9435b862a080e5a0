"""Runs a command as its user does and checks what the user sees."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_vtrans.commands.command import USER_ERROR, run_command
from tests.runs import ENTRY, ROOT


def told(
    capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], arguments: list[str]
) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    status = run_command(command, arguments)
    return one_line(status, capsys.readouterr().err)


def one_line(status: int | None, errors: str) -> str:
    """The one line on standard error of a command that failed as it should."""
    assert status == USER_ERROR, (status, errors)
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0].removeprefix("error: ")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def process(
    arguments: list[str], *before: str, entry: str = ENTRY, **environment: str
) -> subprocess.Popen[str]:
    """The job as a process; `before` are the words before Python's own."""
    return subprocess.Popen(
        [*before, sys.executable, entry, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
