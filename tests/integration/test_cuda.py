"""Runs on a CUDA device: `pytest -m gpu tests/integration/test_cuda.py`."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.speed.shapes import llama, write_checkpoint
from eval.speed.training import Bench
from llm_vtrans.allocation.choosing import hard_gates
from llm_vtrans.calibration.own_words import NUM_TEXTS, cache_of, texts_at_once
from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.families import Axis
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel, logits_of
from llm_vtrans.masking.fused import FusedNorm, fuse
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.prune import prune
from llm_vtrans.timing import remembered
from tests.runs import ROOT, SEQ_LEN, finish, flags, write_inputs
from tests.tiny import CONFIGS, VOCAB_SIZE, save_tiny
from tests.unit.test_exactness import random_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE, ROUNDED = 1e-3, 2e-2  # of a perplexity, masked against written, in float32 or less
TRIES = 3  # of a budget of time: a device that others use, too, changes its speed in between


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def pruned(arguments: list[str], *launcher: str) -> dict[str, Any]:
    """Runs the job and checks that it computed on the device; its manifest."""
    output = finish(arguments, *launcher)
    assert "cuda, " in output, output
    folder = Path(arguments[arguments.index("--output") + 1])
    manifest: dict[str, Any] = json.loads((folder / "vtrans.json").read_text())
    score = manifest["perplexity"]
    if {"--recover", "--load-in"} & {*arguments}:  # then what is written is another network
        assert score["pruned"] > 0
    else:
        rel = TOLERANCE if "float32" in arguments else ROUNDED
        assert score["pruned"] == pytest.approx(score["tuned"], rel=rel)
    return manifest


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--dtype", "float32"),
        ("--dtype", "float32", "--layout", "per-layer"),
        ("--variant", "vtrans", "--shrink-every", "2"),
        ("--recover", "least-squares"),
        ("--gradient-checkpointing", "--round-to", "auto", "--batch-size", "1"),
        pytest.param(("--load-in", "4bit"), marks=needs("bitsandbytes")),
        pytest.param(("--load-in", "8bit"), marks=needs("bitsandbytes")),
        pytest.param(("--recover", "lora", "--recover-steps", "4"), marks=needs("peft")),
    ],
    ids=" ".join,
)
def test_a_run_is_exact_to_its_end(more: tuple[str, ...], tmp_path: Path) -> None:
    manifest = pruned(flags(write_inputs(tmp_path), "--sparsity", "0.4", *more))
    assert manifest["params"]["after"] <= manifest["budget"]["target"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma", "gpt2"])
def test_other_models_are_exact_too(name: str, dtype: str, tmp_path: Path) -> None:
    given = flags(write_inputs(tmp_path, name=name), "--sparsity", "0.4", "--dtype", dtype)
    pruned(given)


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    again = flags(tmp_path, "--sparsity", "0.4", "--overwrite")
    one, two = (
        {name: digest for name, digest in pruned(again)["sha256"].items() if "tensors" in name}
        for _ in range(2)
    )
    assert one == two and one


@needs("deepspeed")
@pytest.mark.parametrize("file", ["zero2.yaml", "zero3.yaml"])
def test_under_deepspeed(file: str, tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file",
                str(ROOT / "launch/accelerate" / file), "--num_processes", "1"]  # fmt: skip
    pruned(flags(write_inputs(tmp_path), "--sparsity", "0.4"), *launcher)


@pytest.mark.parametrize("shape", ["prefill:2x16", "decode:2"])
def test_a_budget_of_time(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remembered, "CACHE", tmp_path / "cache")
    given = [*flags(write_inputs(tmp_path)), "--latency-shape", shape, "--latency-ms"]

    def limit(asked: str, told: str) -> float:
        assert run_command(prune, [*given, asked]) == USER_ERROR
        found = re.search(told + r" ([\d.]+) ms", capsys.readouterr().err)
        assert found is not None
        return float(found[1])

    def status() -> int:
        # Layers alone shorten passes of models this small: most of the way is out of reach.
        dense, smallest = limit("1e9", "the model takes"), limit("1e-3", "the smallest model has")
        return run_command(prune, [*given, str((dense + smallest) / 2)])

    assert 0 in (status() for _ in range(TRIES))
    manifest = json.loads((tmp_path / "out" / "vtrans.json").read_text())
    assert manifest["budget"]["kind"] == "ns" and manifest["budget"]["achieved"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_networks_compute_what_they_do_on_a_processor(name: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    architecture = source.architecture
    tokens = torch.randint(1, VOCAB_SIZE, (2, SEQ_LEN))
    tokens = tokens[None] if name.endswith("choose") else tokens
    plan = random_plan(architecture, False, 1)
    found = []
    for device in (torch.device("cpu"), CUDA):
        model = load_model(source, torch.float32, device)
        tuning = Tuning(architecture, architecture.rotates).to(device)
        masked = MaskedModel(model, architecture, tuning)
        tuning.is_on = True
        masked.set_gates(hard_gates(plan, device))
        logits = logits_of(masked.model(input_ids=tokens.to(device), use_cache=False))
        logits.float().logsumexp(-1).sum().backward()
        grads = [scale.grad for scale in tuning.scales.values() if scale.grad is not None]
        found.append((logits, torch.cat([grad.flatten() for grad in grads])))
    for on_processor, on_device in zip(*found, strict=True):
        torch.testing.assert_close(on_device.cpu(), on_processor, rtol=1e-3, atol=1e-3)


def test_norms_are_fused_and_texts_written_together(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    model = load_model(source, torch.bfloat16, CUDA)
    x = torch.randn(3, source.architecture.num_units[Axis.HIDDEN], device=CUDA).bfloat16()
    before = model.model.norm(x)
    fuse(model, source.architecture.named_tensors())
    assert isinstance(model.model.norm, FusedNorm)
    torch.testing.assert_close(model.model.norm(x), before, rtol=2**-7, atol=0)
    assert texts_at_once(model, 8) > NUM_TEXTS and cache_of(model) == "static"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert texts_at_once(stock, 8) == NUM_TEXTS and cache_of(stock) is None


@needs("liger_kernel")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_fused_kernels_compute_what_the_library_does(name: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    tokens = torch.arange(18, device=CUDA).view(2, 9)
    found = []
    for is_fused in (False, True):
        model = load_model(source, torch.float32, CUDA)
        if is_fused:
            fuse(model, source.architecture.named_tensors())
            assert type(model.model.layers[0].self_attn).__name__.startswith("Fused")
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embedded)[0]
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), embedded.grad))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_training_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    folder = tmp_path / "of multiples of 64"
    write_checkpoint(folder, llama(hidden=256, ffn=704, layers=2, heads=4))
    bench = Bench(str(folder), 2, 8, torch.bfloat16)
    for step in (bench.search_step, bench.tune_step):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
