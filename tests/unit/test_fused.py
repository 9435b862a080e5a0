"""What is computed in one kernel is what the library computes in several."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.fused import fuse, replace_gated_ffn, replace_norms, replace_rotary
from tests.tiny import VOCAB_SIZE, save_tiny


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True), ("gemma", False),
     ("llama-classify", True), ("gpt2", False), ("bert-mlm", False)],
)  # fmt: skip
def test_function_stays(name: str, is_fused: bool, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    model = load_model(source, torch.float32, torch.device("cpu"))
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    before = model(input_ids=tokens)[0]
    replace_norms(model, source.architecture.named_tensors())
    torch.testing.assert_close(model(input_ids=tokens)[0], before)
    kinds = [type(module).__name__ for module in model.modules()]
    fused = sum(kind.startswith("Fused") for kind in kinds)
    assert fused == is_fused * (2 * source.architecture.num_layers + 1)


def test_gradient_stays(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    grads = []
    for is_fused in (False, True):
        model = load_model(source, torch.float32, torch.device("cpu"))
        if is_fused:
            replace_norms(model, source.architecture.named_tensors())
        embedded = model.get_input_embeddings()(torch.arange(12)[None]).requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(*grads)


def test_other_dtypes_than_the_weights_go_the_library_s_way(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    norm = load_model(source, torch.float32, torch.device("cpu")).model.norm
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    before = norm(x)
    model = load_model(source, torch.float32, torch.device("cpu"))
    replace_norms(model, source.architecture.named_tensors())
    after = model.model.norm(x)
    assert after.dtype is before.dtype
    assert torch.equal(after, before)


def test_processors_keep_the_library_s(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    model = load_model(source, torch.float32, torch.device("cpu"))
    fuse(model, source.architecture.named_tensors())
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """A rotary embedding by complex numbers."""
    turn = torch.polar(torch.ones(()), torch.atan2(sin, cos))[:, None, :, : cos.shape[-1] // 2]
    found = []
    for x in (q, k):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * turn
        found.append(torch.cat([pairs.real, pairs.imag], dim=-1))
    return found


def gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate = module.gate_proj(x)
    down: torch.Tensor = module.down_proj(gate * gate.sigmoid() * module.up_proj(x))
    return down


@pytest.mark.parametrize(
    ("name", "num_turned", "num_gated"),
    [("llama", 1, 1), ("mistral", 1, 1), ("qwen2", 1, 1), ("qwen3", 1, 1), ("gemma", 1, 0),
     ("llama-classify", 1, 1), ("gpt2", 0, 0), ("bert-mlm", 0, 0)],
)  # fmt: skip
def test_replaced_functions_are_met(
    name: str, num_turned: int, num_gated: int, tmp_path: Path
) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    found = []
    for is_fused in (False, True):
        model = load_model(source, torch.float32, torch.device("cpu"))
        if is_fused:
            calls = []
            for _ in range(2):  # what is replaced already stays
                replace_rotary(model, counted(turned, calls))
                replace_gated_ffn(model, counted(gated, calls))
        embedded = model.get_input_embeddings()(torch.arange(18).view(2, 9)).detach()
        logits = model(inputs_embeds=embedded.requires_grad_())[0]
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), embedded.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    num_layers = source.architecture.num_layers
    assert calls.count("turned") == num_turned * num_layers
    assert calls.count("gated") == num_gated * num_layers


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(function.__name__)
        return function(*args)

    return call


def test_only_this_model_changes(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    one, other = (load_model(source, torch.float32, torch.device("cpu")) for _ in range(2))
    calls: list[str] = []
    replace_rotary(one, counted(turned, calls))
    replace_gated_ffn(one, counted(gated, calls))
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    expected = other(input_ids=tokens)[0]
    assert not calls
    torch.testing.assert_close(one(input_ids=tokens)[0], expected)
    assert calls
