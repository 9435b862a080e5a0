"""A model whose output head shares the embeddings' table, rotated, pruned and still tied."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eval.check_export import masked_logits
from llm_vtrans.prune import prune
from llm_vtrans.record.verification import Subject, verify
from tests.runs import flags, write_inputs
from tests.tiny import VOCAB_SIZE


@pytest.mark.parametrize(
    "name", ["llama-tied", pytest.param("gemma", marks=pytest.mark.slow), "gpt2"]
)
def test_it_is_rotated_and_stays_tied(tmp_path: Path, name: str) -> None:
    given = [*flags(write_inputs(tmp_path, name=name), samples=32), "--quiet"]
    run, other, plain = (tmp_path / folder for folder in ("out", "other", "plain"))
    prune([*given, "--sparsity", "0.4"])
    reuse = [*given, "--masks", str(run), "--sparsity", "0.5", "--layout", "per-layer"]
    prune([*reuse, "--output", str(other)])
    prune([*given, "--sparsity", "0.4", "--tune-share", "0", "--output", str(plain)])
    tokens = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    for folder in (run, other, plain):
        assert json.loads((folder / "vtrans.json").read_text())["rotation"] == "pca"
        assert not [f for f in verify(Subject.open(folder)) if f.is_failure]
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert exported.lm_head.weight is exported.get_input_embeddings().weight
        expected = masked_logits(str(tmp_path / "model"), folder, tokens)
        with torch.no_grad():
            difference = (exported(tokens).logits - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max()
