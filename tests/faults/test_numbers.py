"""Learning rates and budgets beyond reason: the budget holds exactly or the run says why not."""

import json
from pathlib import Path

import pytest

from llm_vtrans.command import run_command
from llm_vtrans.prune import prune
from tests.faults.conftest import Tally
from tests.runs import flags


@pytest.mark.parametrize("rate", ["1e-30", "5", "1000"])
def test_the_budget_holds_whatever_was_learnt(work: Path, rate: str, tally: Tally) -> None:
    """A target that training never reaches, or overshoots, is met by the allocation."""
    arguments = flags(work, "--learning-rate", rate, "--sparsity", "0.6", "--quiet")
    assert run_command(prune, arguments) == 0
    budget = json.loads((work / "out" / "vtrans.json").read_text())["budget"]
    assert 0.97 * budget["target"] <= budget["achieved"] <= budget["target"]
    tally.survived("learning rate")
