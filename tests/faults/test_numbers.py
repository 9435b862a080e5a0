"""Learning rates and budgets beyond reason: the budget holds exactly or the run says why not."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llm_vtrans.commands.command import run_command
from llm_vtrans.prune import prune
from tests.faults.cases import told
from tests.faults.conftest import Tally
from tests.runs import flags


@pytest.mark.parametrize("rate", ["1e-30", "5"])
def test_the_budget_holds_whatever_was_learnt(work: Path, rate: str, tally: Tally) -> None:
    """A target that training never reaches, or overshoots, is met by the allocation."""
    arguments = flags(work, "--learning-rate", rate, "--sparsity", "0.6", "--quiet")
    assert run_command(prune, arguments) == 0
    budget = json.loads((work / "out" / "vtrans.json").read_text())["budget"]
    assert 0.97 * budget["target"] <= budget["achieved"] <= budget["target"]
    tally.survived("learning rate")


def test_a_rate_that_overflows_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    line = told(capsys, prune, flags(work, "--learning-rate", "1000"))
    assert "nan" in line and "lower --learning-rate" in line
    assert not (work / "out" / "config.json").exists()
    tally.survived("learning rate", line)


def grow(work: Path, factor: float) -> None:
    """Weights that are finite themselves, but not what they compute."""
    path = work / "model" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor *= factor
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 3e4), ("bfloat16", 1e38)])
def test_overflow_is_named_before_training(
    work: Path, capsys: pytest.CaptureFixture[str], tally: Tally, dtype: str, factor: float
) -> None:
    grow(work, factor)
    line = told(capsys, prune, flags(work, "--dtype", dtype))
    assert dtype in line and "another --dtype" in line
    assert not (work / "out").exists()
    tally.survived("overflow", line)
