"""What of a config a GGUF file can say; llama.cpp would compute the rest in another way."""

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from llm_vtrans.convert.layouts import layout_of
from llm_vtrans.errors import UserError


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (LlamaConfig(attention_bias=True), "biases"),
    ],
)
def test_what_it_cannot_say(config: PreTrainedConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout_of(config)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=512), 512),
        (MistralConfig(max_position_embeddings=512, sliding_window=64), 64),
        (MistralConfig(max_position_embeddings=512, sliding_window=None), 512),
        (Qwen2Config(max_position_embeddings=512, sliding_window=64), 512),  # is off
        (
            Qwen2Config(
                max_position_embeddings=512, sliding_window=64, use_sliding_window=True,
                max_window_layers=1,
            ),
            64,
        ),
    ],
)  # fmt: skip
def test_a_context_in_which_windows_do_not_slide(config: PreTrainedConfig, length: int) -> None:
    assert layout_of(config).context_length == length
