"""`--track`: what TensorBoard's files hold is what metrics.jsonl holds."""

import json
from pathlib import Path

import pytest

from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.prune import prune
from tests.runs import flags, write_inputs


@pytest.mark.tensorboard
def test_tensorboard_offline(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard library")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_inputs(tmp_path)
    assert run_command(prune, flags(folder, "--track", "tensorboard")) == 0
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    events = EventAccumulator(str(folder / "tracking" / "out")).Reload()
    for name in ("loss", "distillation", "sparsity", "multiplier"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(r["step"], r[name]) for r in records if name in r]  # none in tuning
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [x for _, x in found] == pytest.approx([x for _, x in expected], rel=1e-6)
        assert 0 < len(found) < 8 if name == "multiplier" else len(found) == 8


def test_an_unknown_tracker_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_inputs(tmp_path)
    assert run_command(prune, flags(folder, "--track", "tensorbored")) == USER_ERROR
    assert "--track tensorbored: not installed" in capsys.readouterr().err
    assert not (folder / "out").exists()
