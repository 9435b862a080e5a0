"""A whole run under `--latency-ms`: what it says of time, alone and with a count beside it."""

import json
import re
from pathlib import Path

import pytest

from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.prune import prune
from llm_vtrans.record.manifest import score_of_stages
from llm_vtrans.record.verification import Subject, verify
from llm_vtrans.timing import latency, remembered
from tests.runs import flags, write_inputs


@pytest.mark.parametrize(
    ("timed", "also"),
    [("prefill:2x12", ["--round-to", "auto"]), ("decode:2", ["--sparsity", "0.5"])],
)
def test_a_run_under_a_budget_of_time(
    timed: str,
    also: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is asserted of how long anything takes: that is the machine's."""
    monkeypatch.setattr(remembered, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(latency, "MAX_BLOCKS_SECONDS", 0.0)
    given = [*flags(write_inputs(tmp_path)), "--latency-shape", timed, *also]
    assert run_command(prune, [*given, "--latency-ms", "1e9"]) == USER_ERROR
    # The table is kept, so that the next run finds the dense model as fast.
    dense = re.search(r"the model takes ([\d.]+) ms", capsys.readouterr().err)
    assert dense is not None
    allowed = 0.9 * float(dense[1])
    assert run_command(prune, [*given, "--latency-ms", str(allowed)]) == 0

    manifest = json.loads((tmp_path / "out" / "vtrans.json").read_text())
    budgets = {b["kind"]: b for b in (manifest["budget"], *manifest["also"])}
    assert budgets.keys() == ({"params", "ns"} if "--sparsity" in also else {"ns"})
    assert budgets["ns"]["target"] == pytest.approx(1e6 * allowed, rel=1e-3)
    assert budgets["ns"]["achieved"] > 0
    if "params" in budgets:
        assert budgets["params"]["achieved"] <= budgets["params"]["target"]
    (measured,) = (pair for name, pair in manifest["latency"].items() if timed in name)
    assert measured.keys() == {"dense", "pruned"}
    assert score_of_stages(manifest)["pruned"] > 0
    assert not any(f.is_failure for f in verify(Subject.open(tmp_path / "out")))
    kept = {file.parent.name for file in (tmp_path / "cache").glob("*/*.json")}
    assert kept == {"latency", "dense"} | ({"multiple"} if "--round-to" in also else set())
