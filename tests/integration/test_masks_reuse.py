"""One training serves other budgets: `--masks RUN` allocates and exports without training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.commands.export import export
from llm_vtrans.errors import UserError
from llm_vtrans.loading.source import open_source
from llm_vtrans.prune import prune
from llm_vtrans.record.masks_file import TUNING_FILE, read_found
from tests.runs import flags, trained_tensors, write_inputs


def test_other_budget_and_layout_from_the_same_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(write_inputs(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_command(prune, [*given, "--sparsity", "0.4", "--output", str(first)]) == 0
    reuse = [*given, "--masks", str(first), "--sparsity", "0.6", "--layout", "per-layer"]
    assert run_command(prune, [*reuse, "--output", str(second)]) == 0
    before, after = trained_tensors(first), trained_tensors(second)
    trained = [name for name in before if name.startswith(("mu.", "log_var.", "rotation"))]
    assert all(before[name].equal(after[name]) for name in trained)
    budget = json.loads((second / "vtrans.json").read_text())["budget"]
    assert budget["achieved"] <= budget["target"] == int(0.4 * budget["dense"])

    compute = [*given, "--masks", str(first), "--macs", "0.5", "--output", str(tmp_path / "macs")]
    assert run_command(prune, compute) == 0
    manifest = json.loads((tmp_path / "macs" / "vtrans.json").read_text())
    assert manifest["budget"]["kind"] == "MACs"
    for parts, total in (("parts", "params"), ("mac_parts", "macs")):
        for when in ("before", "after"):
            counted = sum(part[when] for part in manifest[parts].values())
            assert counted == manifest[total][when]

    other = [*reuse, "--prune", "hidden,ffn", "--output", str(tmp_path / "third")]
    assert run_command(prune, other) == 2
    assert "give the same" in capsys.readouterr().err


def test_a_tuning_of_another_version_is_told(tmp_path: Path) -> None:
    given, run = flags(write_inputs(tmp_path)), tmp_path / "run"
    assert run_command(prune, [*given, "--sparsity", "0.4", "--output", str(run)]) == 0
    source = open_source(given[given.index("--model") + 1])
    assert read_found(run, source).tuning.maps
    tensors = load_file(run / TUNING_FILE)
    del tensors["maps.start"]
    save_file(tensors, run / TUNING_FILE)
    with pytest.raises(UserError, match=r"maps\.start.*another version: prune again"):
        read_found(run, source)


def test_several_budgets_are_the_runs_made_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(write_inputs(tmp_path))
    sizes, alone = tmp_path / "sizes", tmp_path / "alone"
    family = [*given, "--budgets", "0.6,0.3,0.4", "--output", str(sizes)]
    assert run_command(prune, [*family, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["output"] for line in lines] == [str(sizes / s) for s in ("0.4", "0.6", "0.3")]

    trained = [*given, "--sparsity", "0.4", "--output", str(alone / "0.4")]
    assert run_command(prune, trained) == 0
    reuse = ["--masks", str(alone / "0.4"), "--sparsity", "0.3", "--output", str(alone / "0.3")]
    assert run_command(prune, [*given, *reuse]) == 0
    for size in ("0.4", "0.3"):
        members = [load_file(folder / size / "model.safetensors") for folder in (sizes, alone)]
        assert members[0].keys() == members[1].keys()
        assert all(torch.equal(members[0][name], members[1][name]) for name in members[0])

    capsys.readouterr()
    shutil.rmtree(sizes / "0.3")
    assert run_command(prune, [*family, "--resume", "--quiet"]) == 0  # only what is missing
    assert load_file(sizes / "0.3" / "model.safetensors").keys() == members[0].keys()
    assert run_command(prune, family) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--budgets", "0.3,much"], "expected shares"),
        (["--budgets", "0.3,0.3"], "expected shares"),
        (["--budgets", "0.3,1.5"], "in (0, 1)"),
        (["--budgets", "0.3,0.4", "--sparsity", "0.3"], "exclude each other"),
        (["--budgets", "0.3,0.4", "--variant", "vtrans"], "run by run"),
        (["--budgets", "0.3,0.9999"], "unreachable"),
    ],
)
def test_budgets_that_cannot_be_met_together(
    extra: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags(write_inputs(tmp_path)), "--output", str(tmp_path / "out"), *extra]
    assert run_command(prune, given) == 2
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*"))  # nothing was begun


def test_another_size_replaces_every_budget_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out"
    assert run_command(prune, flags(write_inputs(tmp_path), "--macs", "0.5")) == 0

    def exported(*budget: str) -> dict[str, Any]:
        output = tmp_path / "-".join(budget)
        assert run_command(export, ["--from", str(run), "--output", str(output), *budget]) == 0
        manifest: dict[str, Any] = json.loads((output / "vtrans.json").read_text())
        return manifest

    larger = exported("--sparsity", "0.2")
    assert larger["budget"]["kind"] == "params" and not larger["also"]
    assert larger["params"]["after"] > 0.7 * larger["params"]["before"]
    cheaper = exported("--macs", "0.7")
    assert cheaper["budget"]["kind"] == "MACs" and not cheaper["also"]
    assert cheaper["budget"]["target"] == int(0.7 * cheaper["budget"]["dense"])
    assert run_command(export, ["--from", str(run), "--output", str(tmp_path / "no")]) == USER_ERROR
    assert "--macs" in capsys.readouterr().err


def test_trained_weights_serve_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(write_inputs(tmp_path), "--variant", "fast", "--data-fraction", "0.5")
    assert run_command(prune, given) == 0
    other = ["--from", str(tmp_path / "out"), "--output", str(tmp_path / "b"), "--sparsity", "0.3"]
    assert run_command(export, other) == USER_ERROR
    line = capsys.readouterr().err
    assert f"--from {tmp_path / 'out'}" in line and "--masks" not in line
