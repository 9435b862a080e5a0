"""`--help` of every command."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.cli import COMMANDS
from tests.runs import ROOT


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown(command: str) -> None:
    """Of every command; that of `prune` names every option."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_vtrans.cli", command, "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if command == "prune":
        shown = set(re.findall(r"--[a-z_-]+", done.stdout))
        assert {f"--{f.name}" for f in fields(PruneArguments)} <= shown
