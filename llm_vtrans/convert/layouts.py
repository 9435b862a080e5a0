"""How a checkpoint of the LLaMA kind is laid out in GGUF: architecture, names, permutations.

llama.cpp rotates pairs of neighbouring entries where `transformers` rotates halves, so
for its `llama` and `deci` architectures the rows of q and k change places; its Qwen
architectures rotate halves too. Layers of different widths are architecture `deci`
(made for Llama-Nemotron), whose head and FFN counts are lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.errors import UserError

# model_type -> (GGUF architecture, whether rows of q and k are permuted)
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "per_layer_llama": ("deci", True),
    "per_layer_mistral": ("deci", True),
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Layout:
    """A checkpoint's shape as GGUF states it.

    Attributes:
        architecture: GGUF's name.
        is_permuted: whether q and k rows change places.
        heads: query heads per layer; 0 where the attention is gone.
        kv_heads: key/value heads per layer.
        ffn: FFN units per layer; 0 where the FFN is gone.
        head_dim: entries of a head.
        context_length: tokens up to which every layer attends to all.
    """

    architecture: str
    is_permuted: bool
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    head_dim: int
    context_length: int

    @property
    def is_uniform(self) -> bool:
        """Whether one number says it for all layers."""
        return self.architecture != "deci"

    @property
    def bare_attention(self) -> tuple[int, ...]:
        """Layers that have attention and no FFN.

        llama.cpp leaves such a layer before it adds the attention's output, so it is given an
        FFN of one unit with zero weights, which adds nothing.
        """
        return tuple(i for i, n in enumerate(self.ffn) if not n and self.heads[i])


def layout_of(config: Any) -> Layout:
    """Layout of a parsed config.

    Raises:
        UserError: llama.cpp has no architecture that computes this model.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"model type {kind!r} cannot be written as GGUF; known are {', '.join(ARCHITECTURES)} "
            "(for others prune with --layout stock)"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise UserError("llama.cpp's llama knows no biases: this model cannot be written as GGUF")
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(
            f"config.json: hidden_act is {config.hidden_act!r}, and llama.cpp's {kind} knows silu "
            "alone: this model cannot be written as GGUF"
        )
    architecture, is_permuted = ARCHITECTURES[kind]
    number = config.num_hidden_layers
    if architecture == "deci":
        layers = [config.per_layer_config[i] for i in range(number)]
        skips = [set(getattr(layer, "skip", None) or ()) for layer in layers]

        def counts(name: str, part: str) -> tuple[int, ...]:
            return tuple(
                0 if part in skip else getattr(layer, name)
                for layer, skip in zip(layers, skips, strict=True)
            )

        heads, kv_heads, ffn = (
            counts("num_attention_heads", "attention"),
            counts("num_key_value_heads", "attention"),
            counts("intermediate_size", "ffn"),
        )
        head_dim = config.head_dim
    else:
        heads = (config.num_attention_heads,) * number
        kv_heads = (config.num_key_value_heads,) * number
        ffn = (config.intermediate_size,) * number
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    return Layout(
        architecture, is_permuted, heads, kv_heads, ffn, head_dim, _context_length(config)
    )


def _context_length(config: Any) -> int:
    """Tokens up to which no window slides: these architectures know none."""
    longest = int(config.max_position_embeddings)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if slides else None
    return min(longest, window or longest)


def gguf_name(name: str) -> str:
    """GGUF's name of a checkpoint's tensor.

    Raises:
        UserError: a tensor that the layout does not know.
    """
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    prefix, _, rest = name.partition("layers.")
    layer, _, rest = rest.partition(".")
    stem, _, leaf = rest.rpartition(".")
    if prefix != "model." or stem not in LAYER_NAMES:
        raise UserError(f"tensor {name} has no name in GGUF: this model cannot be written")
    return f"blk.{layer}.{LAYER_NAMES[stem]}.{leaf}"


def arranged(name: str, weight: Tensor, layout: Layout) -> Tensor:
    """A tensor as GGUF stores it: q and k rows in pairs instead of halves where it says so."""
    if not layout.is_permuted or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = weight.shape[0] // layout.head_dim
    halves = weight.reshape(heads, 2, layout.head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def empty_ffn(layer: int, hidden_size: int) -> dict[str, Tensor]:
    """An FFN of one unit that adds nothing, for a layer of attention alone."""
    row = torch.zeros(1, hidden_size)
    return {
        f"blk.{layer}.ffn_norm.weight": torch.ones(hidden_size),
        f"blk.{layer}.ffn_gate.weight": row,
        f"blk.{layer}.ffn_up.weight": row,
        f"blk.{layer}.ffn_down.weight": row.T.contiguous(),
    }
