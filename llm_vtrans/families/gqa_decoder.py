"""LLaMA-like decoders, with and without grouped-query attention: llama, mistral, qwen2, qwen3.

Pre-norm with RMSNorm, rotary positions, gated FFN. Query heads lie KV-major (the
heads of group 0 first), so a key/value group is one block of consecutive rows in
each of q, k and v.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Dim,
    Family,
    Shape,
    Stream,
    Sublayer,
    TensorSpec,
    head_of,
    register,
)
from llm_vtrans.families.layouts import per_layer_names, skipped

ATTENTION_NORM = "model.layers.{}.input_layernorm.weight"
FFN_NORM = "model.layers.{}.post_attention_layernorm.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads


def describe(config: Any) -> Architecture:
    """The table of a decoder with LLaMA's tensor names."""
    head_dim = _head_dim(config)
    num_groups = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % num_groups:
        raise UserError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({num_groups}): config.json is damaged"
        )
    hidden = Dim(config.hidden_size, Axis.HIDDEN)
    query = Dim(config.num_attention_heads * head_dim, Axis.HEADS)
    key = Dim(num_groups * head_dim, Axis.HEADS)
    ffn = Dim(config.intermediate_size, Axis.FFN)
    vocab, in_head = Dim(config.vocab_size), Dim(head_dim)
    is_lm = head_of(config) == "ForCausalLM"
    tied = is_lm and bool(config.tie_word_embeddings)
    head = TensorSpec(HEAD, (vocab, hidden), Stream.READS, norm=FINAL_NORM)
    if head_of(config) == "ForSequenceClassification":
        head = replace(head, name="score.weight", dims=(Dim(config.num_labels), hidden))
    elif not is_lm:
        raise UserError(f"{config.model_type} as {head_of(config)} is not supported")
    return Architecture(
        num_layers=config.num_hidden_layers,
        num_units={
            Axis.HIDDEN: config.hidden_size,
            Axis.HEADS: num_groups,
            Axis.FFN: config.intermediate_size,
        },
        tensors=(
            TensorSpec("model.embed_tokens.weight", (vocab, hidden), Stream.WRITES, is_lookup=True),
            *_attention(config, hidden, query, key, in_head),
            *_ffn(config, hidden, ffn),
            TensorSpec(FINAL_NORM, (hidden,), Stream.SCALES),
            *(() if tied else (head,)),
        ),
        final_norm=FINAL_NORM,
        tied_head=HEAD if tied else None,
        max_positions=config.max_position_embeddings,
        divides_hidden=config.num_attention_heads // num_groups if _stays_llama(config) else None,
        rotates=True,
    )


def _stays_llama(config: Any) -> bool:
    """Whether it cannot be written as mistral, which takes widths that LlamaConfig refuses."""
    has_biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return bool(config.model_type == "llama" and has_biases)


def _attention(
    config: Any, hidden: Dim, query: Dim, key: Dim, in_head: Dim
) -> tuple[TensorSpec, ...]:
    prefix = "model.layers.{}.self_attn."
    # Mistral's class has no biases, Qwen2's those of the inputs, whatever a config says.
    is_told = config.model_type not in ("mistral", "qwen2")
    output_bias = is_told and getattr(config, "attention_bias", False)
    input_bias = output_bias or config.model_type == "qwen2"
    part = Sublayer.ATTENTION
    rows = [TensorSpec(ATTENTION_NORM, (hidden,), Stream.SCALES, part)]
    for name, width in (("q", query), ("k", key), ("v", key)):
        stem = f"{prefix}{name}_proj"
        rows.append(
            TensorSpec(f"{stem}.weight", (width, hidden), Stream.READS, part, ATTENTION_NORM)
        )
        if input_bias:
            rows.append(TensorSpec(f"{stem}.bias", (width,), sublayer=part))
    if config.model_type == "qwen3":
        rows += [
            TensorSpec(f"{prefix}{n}_norm.weight", (in_head,), sublayer=part) for n in ("q", "k")
        ]
    rows.append(TensorSpec(f"{prefix}o_proj.weight", (hidden, query), Stream.WRITES, part))
    if output_bias:
        rows.append(TensorSpec(f"{prefix}o_proj.bias", (hidden,), Stream.WRITES, part))
    return tuple(rows)


def _ffn(config: Any, hidden: Dim, ffn: Dim) -> tuple[TensorSpec, ...]:
    prefix = "model.layers.{}.mlp."
    bias = config.model_type == "llama" and getattr(config, "mlp_bias", False)
    part = Sublayer.FFN
    rows = [TensorSpec(FFN_NORM, (hidden,), Stream.SCALES, part)]
    for name in ("gate", "up"):
        stem = f"{prefix}{name}_proj"
        rows.append(TensorSpec(f"{stem}.weight", (ffn, hidden), Stream.READS, part, FFN_NORM))
        if bias:
            rows.append(TensorSpec(f"{stem}.bias", (ffn,), sublayer=part))
    rows.append(TensorSpec(f"{prefix}down_proj.weight", (hidden, ffn), Stream.WRITES, part))
    if bias:
        rows.append(TensorSpec(f"{prefix}down_proj.bias", (hidden,), Stream.WRITES, part))
    return tuple(rows)


def _group_size(config: dict[str, Any]) -> int:
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    return int(config["num_attention_heads"] // groups)


def _base_config(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Fields both layouts share: widths and what is listed per layer."""
    new = dict(config)
    new["head_dim"] = config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    new["hidden_size"] = shape.hidden
    new["num_hidden_layers"] = len(shape.kept_layers)
    if config.get("layer_types"):
        new["layer_types"] = [config["layer_types"][i] for i in shape.kept_layers]
    return new


def stock_config(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The config of a model with one shape for all layers."""
    new = _base_config(config, shape)
    layer = shape.kept_layers[0]
    new["num_key_value_heads"] = shape.heads[layer]
    new["num_attention_heads"] = shape.heads[layer] * _group_size(config)
    new["intermediate_size"] = shape.ffn[layer]
    if new["model_type"] == "llama" and new["hidden_size"] % new["num_attention_heads"]:
        return _as_mistral(new)
    return new


def _as_mistral(config: dict[str, Any]) -> dict[str, Any]:
    """A llama whose widths LlamaConfig refuses, written as mistral: the same function.

    LlamaConfig demands `hidden_size % num_attention_heads == 0` although `head_dim` is
    explicit; MistralConfig does not, and without a sliding window it computes the same. It has
    no biases, so plans for a llama with them keep to what LlamaConfig takes (`divides_hidden`).
    """
    assert not (config.get("attention_bias") or config.get("mlp_bias"))
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp")
    new = {key: value for key, value in config.items() if key not in dropped}
    return new | {
        "model_type": "mistral",
        "architectures": [config["architectures"][0].replace("Llama", "Mistral")],
        "sliding_window": None,
    }


def per_layer_config(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The config of a model in which every layer has its own shape."""
    new = _base_config(config, shape)
    group = _group_size(config)
    # The global values are never used by a layer; they are what a reader of the file expects.
    new["num_key_value_heads"] = max(shape.heads)
    new["num_attention_heads"] = max(shape.heads) * group
    new["intermediate_size"] = max(max(shape.ffn), 1)
    new["per_layer_config"] = {
        str(position): {
            "num_attention_heads": shape.heads[layer] * group,
            "num_key_value_heads": shape.heads[layer],
            "intermediate_size": shape.ffn[layer],
            "skip": skipped(shape, layer),
        }
        for position, layer in enumerate(shape.kept_layers)
    }
    return per_layer_names(new)


GQA_DECODER = register(
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        describe=describe,
        stock_config=stock_config,
        per_layer_config=per_layer_config,
        ignored=(".rotary_emb.inv_freq",),
    )
)
