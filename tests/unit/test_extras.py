"""A library that the user did not install is named before any work, with the extra that has it."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_vtrans.commands.command import run_command
from llm_vtrans.convert.command import convert
from llm_vtrans.prune import prune
from tests.faults.cases import one_line
from tests.runs import ROOT, flags

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("entry", "options", "asked", "package"),
    [
        (prune, ["--load-in", "4bit"], "--load-in 4bit", "bitsandbytes"),
        (prune, ["--recover", "lora"], "--recover lora", "peft"),
        (prune, [], "the launch", "deepspeed"),
        (convert, ["gguf", "RUN"], "convert gguf", "gguf"),
    ],
)
def test_it_is_told_what_to_install(
    entry: Callable[[list[str]], object],
    options: list[str],
    asked: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if package == "deepspeed":  # as `accelerate launch` with a configuration of DeepSpeed says it
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, package, None)
    given = flags(tmp_path, *options) if entry is prune else options
    status, captured = run_command(entry, given), capsys.readouterr()
    line = one_line(status, captured.err)
    assert not captured.out
    found = re.search(r"(.+) needs (\w+): pip install 'llm-vtrans\[(\w+)\]'", line)
    assert found is not None, line
    assert asked in found[1] and found[2] == package
    assert any(re.match(rf"{package}\b", each) for each in EXTRAS[found[3]])
    assert not (tmp_path / "out").exists()
