"""The same run twice, a run that is killed and continued, and runs that write nothing."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.prune import prune
from tests.runs import HALVES, copy_inputs, finish, flags, start, trained_tensors, write_inputs

NUM_STEPS = 100
SETTINGS = ("--save-every", "1", "--shard-size", "10KB", *HALVES)
STATE = "out/state/training.safetensors"


def long_run(folder: Path, *more: str) -> list[str]:
    return flags(folder, *SETTINGS, *more, samples=2 * NUM_STEPS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and the result of a run without interruption."""
    folder = write_inputs(tmp_path_factory.mktemp("uninterrupted"))
    prune(long_run(folder))
    return folder


@pytest.fixture
def work(uninterrupted: Path, tmp_path: Path) -> Path:
    """The same inputs without a result."""
    return copy_inputs(uninterrupted, tmp_path)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of shards, index, config and each tensor of the masks.

    The header of that file records the command's paths and flags, which differ here.
    """
    files = [*(folder / "out").glob("model*"), folder / "out" / "config.json"]
    assert len(files) >= 4  # two shards or more, their index and the config
    contents = {path.name: path.read_bytes() for path in files}
    masks = trained_tensors(folder / "out")
    contents |= {name: tensor.numpy().tobytes() for name, tensor in masks.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the speed."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
        for line in lines
    ]


def saved_step(folder: Path) -> int:
    """Step of the saved state, 0 if there is none."""
    try:
        with safe_open(folder / STATE, framework="pt") as state:
            return int(state.metadata()["step"])
    except (FileNotFoundError, SafetensorError):
        return 0


def saved_phases(folder: Path) -> dict[str, dict[str, float]]:
    """What the run had cost when its state was saved."""
    with safe_open(folder / STATE, framework="pt") as state:
        phases: dict[str, dict[str, float]] = json.loads(state.metadata()["phases"])
    return phases


def kill_after(folder: Path, step: int, *more: str) -> None:
    """Starts the run and kills it as soon as a state of `step` or later is saved."""
    process = start(long_run(folder, *more))
    while saved_step(folder) < step and process.poll() is None:
        time.sleep(0.005)  # leaves the processor to the run
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert step <= saved_step(folder) < NUM_STEPS
    assert not (folder / "out" / "vtrans.json").exists()


def test_same_seed_twice(uninterrupted: Path, work: Path) -> None:
    finish(long_run(work))
    assert hashes(work) == hashes(uninterrupted)
    assert metrics(work) == metrics(uninterrupted)


def test_kill_and_resume(
    uninterrupted: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two kills in different stages, the second one of a resumed run."""
    kill_after(work, 1)
    assert run_command(prune, long_run(work)) == USER_ERROR
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "--resume" in errors[0] and "--overwrite" in errors[0]

    first = saved_step(work)
    kill_after(work, max(first + 20, NUM_STEPS // 2 + 5), "--resume")
    second, before = saved_step(work), saved_phases(work)
    assert before["search"]["seconds"] > 0 and before["tune"]["seconds"] > 0
    half_written = (work / STATE).with_name(".training.safetensors.partial-4000000000")
    half_written.write_bytes(b"a kill while a state was being written leaves this")
    with (work / STATE).with_name("metrics.jsonl").open("a") as file:
        file.write('{"step": 11')  # and this

    assert run_command(prune, long_run(work, "--resume")) == 0
    assert f"resumed after step {second}" in capsys.readouterr().out
    assert hashes(work) == hashes(uninterrupted)
    phases = json.loads((work / "out" / "vtrans.json").read_text())["phases"]
    for name, phase in before.items():
        assert all(phases[name][key] >= earlier for key, earlier in phase.items())
    assert phases["search"] == before["search"]  # was over; tuning went on
    assert phases["tune"]["seconds"] > before["tune"]["seconds"]
    whole = json.loads((uninterrupted / "out" / "vtrans.json").read_text())["phases"]
    assert phases.keys() == whole.keys()
    assert [line["step"] for line in metrics(work)] == list(range(1, NUM_STEPS + 1))
    assert metrics(work) == metrics(uninterrupted)
    assert {path.name for path in (work / "out").iterdir()} == {
        path.name for path in (uninterrupted / "out").iterdir()
    }
    assert {path.name for path in work.iterdir()} == {"model", "text.txt", "out"}


def test_a_state_that_lacks_something_is_told(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one of the second stage that an older version wrote."""
    kill_after(work, NUM_STEPS // 2 + 5)
    with safe_open(work / STATE, framework="pt") as state:
        metadata = state.metadata()
    tensors = {name: t for name, t in load_file(work / STATE).items() if name != "extra.untuned"}
    save_file(tensors, work / STATE, metadata)
    assert run_command(prune, long_run(work, "--resume", "--quiet")) == USER_ERROR
    errors = capsys.readouterr().err
    line = errors.splitlines()[-1]  # a library may say something before
    assert "untuned" in line and "--overwrite" in line and "Traceback" not in errors


def test_a_state_that_lacks_what_the_run_had_cost_is_resumed(
    uninterrupted: Path, work: Path
) -> None:
    """One that an older version wrote: only what comes after it is counted."""
    kill_after(work, NUM_STEPS // 2 + 5)
    with safe_open(work / STATE, framework="pt") as state:
        metadata = state.metadata()
    del metadata["phases"]
    save_file(load_file(work / STATE), work / STATE, metadata)
    assert run_command(prune, long_run(work, "--resume", "--quiet")) == 0
    assert hashes(work) == hashes(uninterrupted)
    phases = json.loads((work / "out" / "vtrans.json").read_text())["phases"]
    assert "tune" in phases and "search" not in phases


def test_resume_of_nothing_runs(work: Path) -> None:
    assert run_command(prune, flags(work, "--resume")) == 0
    assert (work / "out" / "vtrans.json").is_file()
    assert not (work / "out" / "state").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_dry_run_writes_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    if exists:
        (work / "out").mkdir()
    before = sorted(work.rglob("*"))
    assert run_command(prune, flags(work, "--dry-run", "--sparsity", "0.4")) == 0
    assert sorted(work.rglob("*")) == before
    assert "40.0% less" in capsys.readouterr().out


def test_recipe_and_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: some/folder\nsparsity: 0.3\nprune: [ffn, heads]\nseq-len: 128\nkl_weight: 1e-5\n"
        "layout: per-layer\noverwrite: true\nrevision: null\n"
    )
    same = [
        *("--model", "some/folder", "--sparsity", "0.3", "--prune", "ffn,heads"),
        *("--seq_len", "128", "--kl-weight", "1e-5", "--layout", "per-layer", "--overwrite"),
    ]
    from_recipe, from_flags = parse(["--config", str(recipe)]), parse(same)
    assert from_recipe.sparsity == 0.3 and from_recipe.structures() == ("heads", "ffn")
    assert from_recipe.overwrite and from_recipe.kl_weight == 1e-5 and from_recipe.seq_len == 128
    from_flags.config = str(recipe)
    assert from_recipe == from_flags


@pytest.mark.parametrize("order", [1, -1])
def test_flags_win_over_the_recipe(tmp_path: Path, order: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.3\nseed: 5\noverwrite: true\n")
    parts = [["--config", str(recipe)], ["--sparsity", "0.6", "--overwrite", "false"]][::order]
    parsed = parse([word for part in parts for word in part])
    assert (parsed.sparsity, parsed.seed, parsed.overwrite) == (0.6, 5, False)


def test_a_flag_replaces_the_budget_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.3\n")
    parsed = parse(["--config", str(recipe), "--params", "3.4B"])
    assert parsed.sparsity is None and parsed.num_params() == 3_400_000_000
