"""What is settled when a checkpoint is opened, so that everything later sees the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.prune import prune
from tests.runs import flags, write_inputs
from tests.tiny import save_tiny


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["stock", "per-layer"])
def test_a_config_that_names_no_class(name: str, layout: str, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path, name=name)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    (named,) = config.pop("architectures")
    path.write_text(json.dumps(config))
    prune(flags(folder, "--layout", layout))
    written = json.loads((folder / "out" / "config.json").read_text())["architectures"]
    assert written == [named if layout == "stock" else f"PerLayer{named}"] or (
        name == "llama" and written == ["MistralForCausalLM"]  # widths that LlamaConfig refuses
    )


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_head_that_is_stored(is_same: bool, tmp_path: Path) -> None:
    """Where it differs from the embeddings, the library leaves them apart, and so do we."""
    folder = save_tiny("llama-tied", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if is_same else torch.randn_like(table)
    save_file(tensors, path, {"format": "pt"})
    source = open_source(str(folder))
    assert (source.architecture.tied_head is not None) == is_same
    tokens = torch.arange(1, 9)[None]
    ours = load_model(source, torch.float32, torch.device("cpu"))(tokens).logits
    stock = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(ours, stock)
