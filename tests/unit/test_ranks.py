"""A launch that asks for DeepSpeed and cannot have it ends in one line, before any work."""

from pathlib import Path

import pytest

from llm_vtrans.commands.command import run_command
from llm_vtrans.distributed import ranks
from llm_vtrans.prune import prune
from tests.faults.cases import one_line
from tests.runs import flags


def asked_for(config: Path, patch: pytest.MonkeyPatch) -> None:
    """What launch/slurm/ranks.sh sets for DEEPSPEED_CONFIG."""
    patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))


@pytest.mark.parametrize(
    "text", [None, "", '{"zero_optimization":', "[]", "zero", "{}", '{"zero_optimization": 3}']
)
def test_a_configuration_that_is_none(
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "zero3.json"
    if text is not None:
        config.write_text(text)
    asked_for(config, monkeypatch)
    monkeypatch.setattr(ranks, "require", lambda *_: None)
    line = one_line(run_command(prune, flags(tmp_path)), capsys.readouterr().err)
    assert str(config) in line and "ds_configs/" in line
