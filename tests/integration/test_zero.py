"""One rank, two ranks and ZeRO-1, 2 and 3 on two ranks train the same masks (real processes)."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_vtrans.prune import prune
from tests.integration.test_recover import recovering
from tests.integration.test_two_ranks import GLOBAL_BATCH, NUM_STEPS, TWO_RANKS
from tests.runs import ENTRY, ROOT, finish, flags, start, trained_tensors, write_inputs
from tests.unit.test_recovery import needs_peft

HALF = GLOBAL_BATCH // 2
RECOVERIES = ("lora", "full")
SET_UPS = {  # name -> DeepSpeed configuration, model, further flags
    "2 ranks": (None, "llama", ()),
    "ZeRO-1": ("zero1", "llama", ()),
    "ZeRO-2": ("zero2", "llama", ()),
    "ZeRO-3": ("zero3", "llama", ()),
    "ZeRO-3, recomputing": ("zero3", "llama", ("--gradient-checkpointing",)),
    "ZeRO-3, offloaded": ("zero3_offload_cpu", "llama", ()),
    "ZeRO-3, tied": ("zero3", "llama-tied", ()),
    "ZeRO-3, layer norms": ("zero3", "gpt2", ()),
}
QUICK = ("ZeRO-3",)  # two ranks alone: test_two_ranks.py
GLOO_ALONE = "tests/gloo_alone.py"  # the quick tests wait for no compiler
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its collectives: needs g++"
)
SLOW = (pytest.mark.slow, needs_compiler)

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed library"
    ),
]


@contextmanager
def deepspeed(name: str | None, folder: Path) -> Iterator[None]:
    """What `accelerate launch` sets for a DeepSpeed configuration of ds_configs/."""
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
            if config["zero_optimization"]["stage"] == 3:  # else the tiny tensors stay whole
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            path = folder / "deepspeed.json"
            path.write_text(json.dumps(config))
            patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        yield


def result(folder: Path) -> dict[str, torch.Tensor]:
    return trained_tensors(folder / "out")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """What one rank finds, by the name of the tiny model."""

    @cache
    def run(model: str) -> dict[str, torch.Tensor]:
        folder = write_inputs(tmp_path_factory.mktemp("one"), name=model)
        more = ("--gradient-accumulation", "2")
        prune(flags(folder, *more, samples=NUM_STEPS * GLOBAL_BATCH, batch_size=HALF))
        return result(folder)

    return run


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in SET_UPS]
)
def test_same_masks(
    name: str, one_rank: Callable[[str], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config, model, more = SET_UPS[name]
    folder = write_inputs(tmp_path, name=model)
    with deepspeed(config, folder):
        samples = NUM_STEPS * GLOBAL_BATCH
        entry = GLOO_ALONE if name in QUICK else ENTRY
        finish(flags(folder, *more, samples=samples, batch_size=HALF), *TWO_RANKS, entry=entry)
    found, expected = result(folder), one_rank(model)
    assert found.keys() == expected.keys()
    kept = [key for key in found if key.startswith("keep.")]
    same = sum(int((found[key] == expected[key]).sum()) for key in kept)
    total = sum(expected[key].numel() for key in kept)
    print(f"{name}: {same} of {total} units kept or dropped as on one rank")
    assert same == total > 0
    for key in found:
        if key.startswith(("mu.", "log_var.")):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after each recovery on one rank."""
    found = {}
    for name in RECOVERIES:
        folder = write_inputs(tmp_path_factory.mktemp(name))
        finish(recovering(folder, name, "--gradient-accumulation", "2"))
        found[name] = load_file(folder / "out" / "model.safetensors")
    return found


@needs_peft
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recovery"),
    [("zero1", "lora"), ("zero2", "lora"), ("zero3", "lora"), ("zero1", "full"), ("zero2", "full")],
)
def test_same_recovery(
    name: str, recovery: str, recovered: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = write_inputs(tmp_path)
    with deepspeed(name, folder):
        finish(recovering(folder, recovery), *TWO_RANKS)
    found = load_file(folder / "out" / "model.safetensors")
    assert found.keys() == recovered[recovery].keys()
    for key, weight in recovered[recovery].items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "recovery", ["full", pytest.param("least-squares", marks=pytest.mark.slow)]
)
def test_whole_weights_are_refused_in_slices(recovery: str, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path)
    with deepspeed("zero3", folder):
        process = start(recovering(folder, recovery), *TWO_RANKS, entry=GLOO_ALONE)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert f"error: --recover {recovery} under ZeRO-3" in errors and "lora" in errors
    assert not (folder / "out").exists()
