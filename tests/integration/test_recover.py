"""`prune --recover`: the same checkpoint with other weights; ranks, kills and hashes."""

import json
import signal
import time
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file

from llm_vtrans.commands.command import run_command
from llm_vtrans.commands.verify import verify
from llm_vtrans.prune import prune
from tests.integration.test_two_ranks import TWO_RANKS
from tests.runs import copy_inputs, finish, flags, start, write_inputs
from tests.unit.test_recovery import needs_peft

SEARCHED, STEPS = 8, 12  # optimizer steps of the masks, and of the recovery
UNTUNED = ("--tune-share", "0")  # after tuning least squares would not be taken
METHODS = ["least-squares", "full", pytest.param("lora", marks=needs_peft)]


def recovering(folder: Path, name: str, *more: str, steps: int = STEPS, half: int = 2) -> list[str]:
    """Flags of a run with a recovery and a global batch of four."""
    trained = () if name == "least-squares" else ("--recover-steps", str(steps))
    chosen = ("--recover", name, *trained, "--layout", "per-layer", *more)
    return flags(folder, *chosen, samples=4 * SEARCHED, batch_size=half)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and a result without recovery."""
    folder = write_inputs(tmp_path_factory.mktemp("plain"))
    options = recovering(folder, "none", "--recover-steps", "0", half=4)
    assert run_command(prune, options) == 0
    return folder


@pytest.fixture
def work(plain: Path, tmp_path: Path) -> Path:
    """The same inputs."""
    return copy_inputs(plain, tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_recovered_checkpoint(
    plain: Path, work: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, names, shapes and dtypes are those of a run without recovery; hashes hold."""
    untuned = UNTUNED if name == "least-squares" else ()
    if untuned:
        plain = copy_inputs(plain, work / "plain")
        options = recovering(plain, "none", "--recover-steps", "0", *untuned, half=4)
        assert run_command(prune, options) == 0
    assert run_command(prune, recovering(work, name, *untuned, half=4)) == 0
    assert "perplexity before recovery" in capsys.readouterr().out
    out = work / "out"
    assert {p.name for p in out.iterdir()} == {p.name for p in (plain / "out").iterdir()}
    assert (out / "config.json").read_bytes() == (plain / "out" / "config.json").read_bytes()
    before, after = weights(plain), weights(work)
    assert before.keys() == after.keys()
    assert all(
        (before[n].shape, before[n].dtype) == (after[n].shape, after[n].dtype) for n in after
    )
    assert any(not torch.equal(before[n], after[n]) for n in after)
    assert run_command(verify, [str(out)]) == 0

    manifest = json.loads((out / "vtrans.json").read_text())
    unrecovered = json.loads((plain / "out" / "vtrans.json").read_text())
    assert manifest["perplexity"]["exported"] == unrecovered["perplexity"]["pruned"]
    assert manifest["perplexity"]["pruned"] != unrecovered["perplexity"]["pruned"]
    assert manifest["phases"]["recover"]["seconds"] > 0
    num_steps = 0 if name == "least-squares" else STEPS
    assert manifest["recovery"] == {"method": name, "steps": num_steps}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, SEARCHED + num_steps + 1))

    again = [*recovering(work, name, *untuned, half=4), "--resume"]
    assert run_command(prune, again) == 0
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS[1:])
def test_two_ranks_recover_alike(work: Path, tmp_path: Path, name: str) -> None:
    other = copytree(work, tmp_path / "two")
    assert run_command(prune, recovering(work, name, "--gradient-accumulation", "2")) == 0
    finish(recovering(other, name), *TWO_RANKS)
    one, two = weights(work), weights(other)
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-3)


def test_kill_in_the_recovery(work: Path, tmp_path: Path) -> None:
    """It begins anew from the exported weights, which come from the saved masks."""
    steps = 60
    other = copytree(work, tmp_path / "killed")
    assert run_command(prune, recovering(work, "full", steps=steps, half=4)) == 0
    options = recovering(other, "full", steps=steps, half=4)
    process = start(options)
    recorded = other / "out" / "state" / "metrics.jsonl"
    while process.poll() is None:
        rows = recorded.read_text().splitlines() if recorded.is_file() else []
        if len(rows) > SEARCHED + 2:
            break
        time.sleep(0.005)  # leaves the processor to the run
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (other / "out" / "vtrans.json").exists()

    assert run_command(prune, [*options, "--resume"]) == 0
    one, two = weights(work), weights(other)
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = (other / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, SEARCHED + steps + 1))
    assert {path.name for path in other.iterdir()} == {"model", "text.txt", "out"}
