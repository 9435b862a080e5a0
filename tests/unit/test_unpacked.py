"""The library takes rows for one sequence each, while it is told to."""

from pathlib import Path

import pytest
import torch
from transformers import masking_utils

from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.masking.unpacked import unpacked
from tests.tiny import VOCAB_SIZE, save_tiny


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_masked_networks_do_not_look(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(save_tiny(name, tmp_path)))
    model = load_model(source, torch.float32, torch.device("cpu"))
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    expected = model(input_ids=tokens).logits
    hidden = model.base_model(input_ids=tokens)[0]
    masked = MaskedModel(model, source.architecture)

    def look(_: torch.Tensor) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    with pytest.raises(AssertionError, match="looked"):
        model(input_ids=tokens, use_cache=False)
    assert torch.equal(masked(tokens), expected)
    assert torch.equal(masked.hidden_states(tokens), hidden)
    assert masking_utils.find_packed_sequence_indices is look


def test_it_looks_again_after_an_error() -> None:
    look = masking_utils.find_packed_sequence_indices
    with pytest.raises(RuntimeError), unpacked():
        raise RuntimeError
    assert masking_utils.find_packed_sequence_indices is look
