"""Two ranks on one machine train the same masks as one rank with the same global batch."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch

from llm_vtrans.prune import prune
from tests.runs import copy_inputs, finish, flags, trained_tensors, write_inputs

NUM_STEPS, GLOBAL_BATCH = 20, 16
SAMPLES = NUM_STEPS * GLOBAL_BATCH
# `accelerate launch --cpu --num_processes 2` starts a single process: it leaves CPU ranks to
# MPI. torchrun sets the variables that accelerate reads.
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results of one rank and of two, in `out` of each."""
    one = write_inputs(tmp_path_factory.mktemp("one"))
    two = copytree(one, tmp_path_factory.mktemp("two"), dirs_exist_ok=True)
    half = GLOBAL_BATCH // 2
    prune(flags(one, "--gradient-accumulation", "2", samples=SAMPLES, batch_size=half))
    finish(flags(two, samples=SAMPLES, batch_size=half), *TWO_RANKS)
    return one, two


def test_same_masks(folders: tuple[Path, Path]) -> None:
    one, two = (trained_tensors(folder / "out") for folder in folders)
    assert one.keys() == two.keys()
    trained = [name for name in one if name.startswith(("mu.", "log_var."))]
    assert len(trained) == 8
    for name in trained:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
    kept = [name for name in one if name.startswith("keep.")]
    assert len(kept) == 3
    for name in kept:
        assert torch.equal(two[name], one[name]), name


def test_one_rank_writes(folders: tuple[Path, Path]) -> None:
    one, two = (folder / "out" for folder in folders)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    lines = (two / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))


def test_several_budgets(tmp_path: Path) -> None:
    """The ranks stay together until the last result."""
    folder = write_inputs(tmp_path)
    finish(flags(folder, "--budgets", "0.3,0.5"), *TWO_RANKS)
    for share in ("0.3", "0.5"):
        manifest = json.loads((folder / "out" / share / "vtrans.json").read_text())
        assert manifest["params"]["after"] <= (1 - float(share)) * manifest["params"]["before"]


def test_ranks_agree_on_directions(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """However each would round, all take rank zero's basis and train one network."""
    two = folders[1]
    other = copy_inputs(two, tmp_path)
    arguments = flags(other, samples=SAMPLES, batch_size=GLOBAL_BATCH // 2)
    finish(arguments, *TWO_RANKS, entry="tests/other_processor.py")
    expected, found = (trained_tensors(f / "out") for f in (two, other))
    assert "rotation" in expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
