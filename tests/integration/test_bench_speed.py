"""`eval/bench_speed.py` on a tiny model: every section measures and says what."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench_speed import exponent, run
from eval.speed.kernels import is_product
from eval.speed.shapes import llama, problem_of, proportional_shape, write_checkpoint
from llm_vtrans.loading.shaped import empty_network, shaped_config
from llm_vtrans.loading.source import open_source
from tests.runs import ROOT
from tests.tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", llama(32, 48, 2, 4, vocab_size=512), 10**9)
    return tmp_path / "model"


def figures(model: Path, *sections: str) -> dict[str, dict[str, Any]]:
    """What a quick run of these sections writes."""
    output = model.with_name("figures.json")
    run([
        "--model", str(model), "--sections", *sections, "--rounds", "1", "--inference-rounds", "1",
        "--batch-size", "2", "--seq-len", "16", "--round-to", "1", "8", "--output", str(output),
    ])  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    assert [*found] == [*sections]
    return found


def test_a_step_and_its_kernels(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(model, "step", "kernels")
    told = capsys.readouterr().out
    for name in ("search step / bare", "tune step / bare", "share of it in a search step"):
        assert found["step"][name] > 0 and f"{name} = " in told
    for name, times in found["kernels"].items():
        assert f"largest in a {name}" in told
        products = sum(ms for kernel, ms in times.items() if is_product(kernel))
        assert 0 < products < sum(times.values())


@pytest.mark.slow
def test_inference_and_files(model: Path) -> None:
    """A process for each checkpoint and each phase."""
    found = figures(model, "inference", "files")
    dense, *pruned = found["inference"].values()
    assert [*found["inference"]] == ["dense", "multiples of 1", "multiples of 8"]
    assert sum("tokens/s" in name for name in dense) == 4
    for after in pruned:
        assert after["checkpoint, MB"] < 0.7 * dense["checkpoint, MB"]
        assert after.keys() == dense.keys() and all(value > 0 for value in after.values())
    assert all(phase["seconds"] > 0 for phase in found["files"].values())


def test_given_checkpoints_are_measured_beside_the_dense_one(tmp_path: Path) -> None:
    for name, layers in (("dense", 2), ("smaller", 1)):
        write_checkpoint(tmp_path / name, llama(32, 48, layers, 4, vocab_size=512), 10**9)
    output = tmp_path / "figures.json"
    run([
        "--model", str(tmp_path / "dense"), "--pruned", str(tmp_path / "smaller"), "--sections",
        "inference", "--inference-rounds", "1", "--seq-len", "16", "--output", str(output),
    ])  # fmt: skip
    found = json.loads(output.read_text())["inference"]
    assert [*found] == ["dense", "smaller"]
    assert found["smaller"]["checkpoint, MB"] < found["dense"]["checkpoint, MB"]


def test_an_unknown_size_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "eval/bench_speed.py", "--model", "random:9z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --model")


def test_the_exponent_is_that_of_a_power_law() -> None:
    points = [(size, 3 * size**1.2) for size in (1.0, 2.0, 5.0, 9.0)]
    assert math.isclose(exponent(points), 1.2)


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gpt2", "bert-mlm"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_a_proportional_shape_uses_the_budget(name: str, share: float, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    architecture = source.architecture
    problem = problem_of(architecture, 1 - share)
    shape = proportional_shape(architecture, problem)
    assert 0.5 < problem.used(shape) <= 1
    config = shaped_config(source.family, source.config, architecture, shape, is_uniform=True)
    network = empty_network(source, config, torch.float32, torch.device("cpu"))
    assert network.num_parameters() == problem.cost.of(shape)
