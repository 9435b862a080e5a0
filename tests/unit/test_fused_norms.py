"""Norms in one kernel compute what the library's do."""

from pathlib import Path

import pytest
import torch

from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.fused_norms import fuse_norms, replace_norms
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
    fuse_norms(model, source.architecture.named_tensors())
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
