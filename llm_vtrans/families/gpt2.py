"""GPT-2: pre-norm with LayerNorm, learned positions, biases everywhere, one fused projection.

Its weights are stored `(inputs, outputs)` (Conv1D). Queries, keys and values are the
three blocks of `c_attn`, each over all heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Dim,
    Family,
    Norm,
    Role,
    Stream,
    Sublayer,
    TensorSpec,
    head_of,
    register,
)
from llm_vtrans.families.layouts import Fields, coupled_per_layer_config, coupled_stock_config

FIELDS = Fields("n_embd", "n_head", "n_inner", "n_layer")
FINAL_NORM = "transformer.ln_f"
FUSED = (Role.QUERY, Role.KEY, Role.VALUE)


def _describe(config: Any) -> Architecture:
    if config.add_cross_attention or config.scale_attn_by_inverse_layer_idx:
        raise UserError("gpt2 with cross-attention or scale_attn_by_inverse_layer_idx: no support")
    if not config.scale_attn_weights:
        raise UserError("gpt2 with scale_attn_weights false is not supported")
    size, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    hidden, vocab = Dim(size, Axis.HIDDEN), Dim(config.vocab_size)
    head, tensors = head_of(config), []
    is_lm = head in ("LMHeadModel", "ForCausalLM")
    if is_lm and not config.tie_word_embeddings:
        tensors = [TensorSpec("lm_head.weight", (vocab, hidden), Stream.READS)]
    elif head == "ForSequenceClassification":
        tensors = [TensorSpec("score.weight", (Dim(config.num_labels), hidden), Stream.READS)]
    elif not is_lm:
        raise UserError(f"GPT2{head} is not supported")
    return Architecture(
        num_layers=config.n_layer,
        num_units={Axis.HIDDEN: size, Axis.HEADS: config.n_head, Axis.FFN: inner},
        tensors=(
            TensorSpec("transformer.wte.weight", (vocab, hidden), Stream.WRITES, is_lookup=True),
            TensorSpec(
                "transformer.wpe.weight",
                (Dim(config.n_positions), hidden),
                Stream.WRITES,
                is_lookup=True,
            ),
            *_layer(hidden, Dim(inner, Axis.FFN)),
            *_norm(FINAL_NORM, hidden, None),
            *tensors,
        ),
        final_norm=f"{FINAL_NORM}.weight",
        tied_head="lm_head.weight" if is_lm and config.tie_word_embeddings else None,
        max_positions=config.n_positions,
        norm=Norm.LAYER,
        couples_heads=True,
        # A head of its own has no bias that could take the final norm's.
        rotates=is_lm and config.tie_word_embeddings,
    )


def _norm(path: str, hidden: Dim, part: Sublayer | None) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(f"{path}.weight", (hidden,), Stream.SCALES, part),
        TensorSpec(f"{path}.bias", (hidden,), Stream.SHIFTS, part),
    )


def _layer(hidden: Dim, ffn: Dim) -> tuple[TensorSpec, ...]:
    prefix = "transformer.h.{}."
    fused = Dim(3 * hidden.size, Axis.HEADS, FUSED)
    mixed = Dim(hidden.size, Axis.HEADS, (Role.OUTPUT,))

    def reads(path: str, out: Dim, part: Sublayer, norm: str) -> tuple[TensorSpec, ...]:
        weight = f"{prefix}{path}.weight"
        norm = f"{prefix}{norm}.weight"
        return (
            TensorSpec(weight, (hidden, out), Stream.READS, part, norm),
            TensorSpec(f"{prefix}{path}.bias", (out,), sublayer=part, reader=weight),
        )

    def writes(path: str, units: Dim, part: Sublayer) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(f"{prefix}{path}.weight", (units, hidden), Stream.WRITES, part),
            TensorSpec(f"{prefix}{path}.bias", (hidden,), Stream.WRITES, part),
        )

    return (
        *_norm(f"{prefix}ln_1", hidden, Sublayer.ATTENTION),
        *reads("attn.c_attn", fused, Sublayer.ATTENTION, "ln_1"),
        *writes("attn.c_proj", mixed, Sublayer.ATTENTION),
        *_norm(f"{prefix}ln_2", hidden, Sublayer.FFN),
        *reads("mlp.c_fc", ffn, Sublayer.FFN, "ln_2"),
        *writes("mlp.c_proj", ffn, Sublayer.FFN),
    )


GPT2 = register(
    Family(
        model_types=("gpt2",),
        describe=_describe,
        stock_config=partial(coupled_stock_config, names=FIELDS),
        per_layer_config=partial(coupled_per_layer_config, names=FIELDS),
        ignored=(".attn.bias", ".attn.masked_bias"),
        base_prefix="transformer.",
    )
)
