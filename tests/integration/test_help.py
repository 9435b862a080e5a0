"""`--help` of every command."""

import re
from dataclasses import fields

import pytest

from llm_vtrans import cli
from llm_vtrans.arguments import PruneArguments


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of `prune` names every option."""
    monkeypatch.setattr("sys.argv", ["llm-vtrans", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 0 and not shown.err
    if command == "prune":
        flags = set(re.findall(r"--[a-z_-]+", shown.out))
        assert {f"--{f.name}" for f in fields(PruneArguments)} <= flags
