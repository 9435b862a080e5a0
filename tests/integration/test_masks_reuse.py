"""One training serves other budgets: `--masks RUN` allocates and exports without training."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llm_vtrans.command import run_command
from llm_vtrans.prune import prune
from tests.runs import flags, write_inputs


def test_other_budget_and_layout_from_the_same_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(write_inputs(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_command(prune, [*given, "--sparsity", "0.4", "--output", str(first)]) == 0
    reuse = [*given, "--masks", str(first), "--sparsity", "0.6", "--layout", "per-layer"]
    assert run_command(prune, [*reuse, "--output", str(second)]) == 0
    before, after = load_file(first / "masks.safetensors"), load_file(second / "masks.safetensors")
    trained = [name for name in before if name.startswith(("mu.", "log_var.", "rotation"))]
    assert all(before[name].equal(after[name]) for name in trained)
    budget = json.loads((second / "vtrans.json").read_text())["budget"]
    assert budget["achieved"] <= budget["target"] == int(0.4 * budget["dense"])

    other = [*reuse, "--prune", "hidden,ffn", "--output", str(tmp_path / "third")]
    assert run_command(prune, other) == 2
    assert "give the same" in capsys.readouterr().err
