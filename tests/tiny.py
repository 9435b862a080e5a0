"""Tiny random models of every family, built in code."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.families.base import head_of

VOCAB_SIZE = 96
WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GPT2_WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 24,
    "n_inner": 20,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ENCODER_WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS),
    "llama-mha": LlamaConfig(**{**WIDTHS, "num_key_value_heads": 6}),
    "llama-bias": LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "mistral": MistralConfig(**WIDTHS, sliding_window=None),
    "qwen2": Qwen2Config(**WIDTHS),
    "qwen3": Qwen3Config(**WIDTHS, tie_word_embeddings=True),
    "gemma": GemmaConfig(**WIDTHS),
    "gemma-untied": GemmaConfig(**WIDTHS, tie_word_embeddings=False),
    "llama-classify": LlamaConfig(
        **{**WIDTHS, "pad_token_id": 0}, num_labels=3,
        architectures=["LlamaForSequenceClassification"],
    ),
    "gpt2": GPT2Config(**GPT2_WIDTHS),
    "gpt2-untied": GPT2Config(**GPT2_WIDTHS, tie_word_embeddings=False),
    "gpt2-classify": GPT2Config(
        **{**GPT2_WIDTHS, "pad_token_id": 0}, num_labels=3,
        architectures=["GPT2ForSequenceClassification"],
    ),
    **{
        f"{config.model_type}-{name}": config(
            **ENCODER_WIDTHS,
            num_labels=labels,
            architectures=[config.__name__.replace("Config", head)],
        )
        for config in (BertConfig, RobertaConfig)
        for name, head, labels in (
            ("mlm", "ForMaskedLM", 2),
            ("classify", "ForSequenceClassification", 3),
            ("choose", "ForMultipleChoice", 2),
            ("answer", "ForQuestionAnswering", 2),
        )
    },
}  # fmt: skip


def tiny_model(name: str, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A random model whose norms and biases are far from their trivial initial values."""
    torch.manual_seed(seed)
    config = config or type(CONFIGS[name])(**CONFIGS[name].to_dict())
    auto = getattr(transformers, AUTO_CLASSES[head_of(config)])
    model: PreTrainedModel = auto.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def padded(num: int) -> dict[str, Tensor]:
    """Texts of six tokens, so many of padding behind them, and the mask that tells which."""
    ids = torch.randint(1, VOCAB_SIZE, (16, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: torch.nn.functional.pad(tensor, (0, num)) for name, tensor in inputs.items()}


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Saves a tiny model with a tokenizer of single letters."""
    tiny_model(name, seed).save_pretrained(folder)
    vocab = {chr(33 + i) if i else "<|endoftext|>": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder
