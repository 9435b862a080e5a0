"""Fresh networks to pretrain: sizes, special tokens and loss of each family."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llm_vtrans.tasks.encoding import masked_windows

SEPARATOR = "<|endoftext|>"
MASKED_SHARE = 0.2  # more than BERT's 15% (arXiv:2202.08005), but most neighbours stay in sight

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """What a family's networks predict, and what they are built from.

    Attributes:
        auto_class: of the network.
        special: special tokens by their roles; the end of text joins documents.
        sizes: flags -> config entries beside those that all families have.
        loss: (network, windows `(batch, seq)`, seed, tokenizer) -> mean loss in nats, `()`.
    """

    auto_class: Any
    special: Mapping[str, str]
    sizes: Callable[[argparse.Namespace], dict[str, Any]]
    loss: Loss


def next_token_loss(model: PreTrainedModel, windows: Tensor, _: int, **__: Any) -> Tensor:
    """Mean cross-entropy of the tokens after the first."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def masked_loss(model: PreTrainedModel, windows: Tensor, seed: int, tokenizer: Any) -> Tensor:
    """Mean cross-entropy of masked tokens; the first is left out, as it is of decoders."""
    examples = masked_windows(windows[:, 1:], tokenizer, seed, model.training, MASKED_SHARE)
    labels = examples.tensors["labels"]
    chosen = labels != -100
    logits = model(input_ids=examples.tensors["input_ids"]).logits[chosen]
    return cross_entropy(logits.float(), labels[chosen])


DECODER_TOKENS = {"bos_token": SEPARATOR, "eos_token": SEPARATOR}
GROUPED_QUERIES = ("gemma", "llama", "mistral", "qwen2", "qwen3")
KINDS = {
    **dict.fromkeys(
        GROUPED_QUERIES,
        Kind(
            AutoModelForCausalLM,
            DECODER_TOKENS,
            lambda flags: {
                "intermediate_size": flags.intermediate_size,
                "num_key_value_heads": flags.num_kv_heads,
                "head_dim": flags.hidden_size // flags.num_heads,
                "max_position_embeddings": flags.max_positions,
                "tie_word_embeddings": flags.tie_embeddings,
            },
            next_token_loss,
        ),
    ),
    "gpt2": Kind(
        AutoModelForCausalLM,
        DECODER_TOKENS,
        lambda flags: {"n_inner": flags.intermediate_size, "n_positions": flags.max_positions},
        next_token_loss,
    ),
    "roberta": Kind(
        AutoModelForMaskedLM,
        {
            "bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>",
            "sep_token": "</s>", "mask_token": "<mask>",
        },
        lambda flags: {
            "intermediate_size": flags.intermediate_size,
            "max_position_embeddings": flags.max_positions + 4,  # padding, two special tokens
            "type_vocab_size": 1,
            # A masked token tells nothing: until heads find its neighbours nothing is learnt.
            # Larger weights and no dropout make that shorter.
            "initializer_range": flags.hidden_size**-0.5 / 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        masked_loss,
    ),
}  # fmt: skip


def build_model(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised float32 model of these sizes for this tokenizer."""
    kind = KINDS[flags.family]
    config = AutoConfig.for_model(
        flags.family,
        vocab_size=len(tokenizer),
        hidden_size=flags.hidden_size,
        num_hidden_layers=flags.num_layers,
        num_attention_heads=flags.num_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kind.sizes(flags),
    )
    model: PreTrainedModel = kind.auto_class.from_config(config)
    return model.float()
