"""RoBERTa: BERT's encoder with positions that start behind the padding index, and other heads."""

from __future__ import annotations

from functools import partial
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Architecture, Family, head_of, register
from llm_vtrans.families.bert import IGNORED, Encoder
from llm_vtrans.families.layouts import Fields, coupled_per_layer_config, coupled_stock_config


def _describe(config: Any) -> Architecture:
    encoder, head = Encoder(config, "roberta."), head_of(config)
    final_norm, tied = "", None
    if head == "ForMaskedLM":
        final_norm, tied = "lm_head.layer_norm.weight", "lm_head.decoder.weight"
        rows = encoder.masked_lm(
            "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
        )
    elif head == "ForSequenceClassification":
        rows = encoder.pooled("classifier.dense", "classifier.out_proj", config.num_labels)
    elif head == "ForMultipleChoice":
        rows = encoder.pooled("roberta.pooler.dense", "classifier", 1)
    elif head == "ForQuestionAnswering":
        rows = encoder.spans()
    else:
        raise UserError(f"Roberta{head} is not supported")
    positions = config.max_position_embeddings - config.pad_token_id - 1
    return encoder.architecture(rows, final_norm, tied, positions)


ROBERTA = register(
    Family(
        model_types=("roberta",),
        describe=_describe,
        stock_config=partial(coupled_stock_config, names=Fields()),
        per_layer_config=partial(coupled_per_layer_config, names=Fields()),
        ignored=IGNORED,
        base_prefix="roberta.",
    )
)
