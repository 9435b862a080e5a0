"""LLaMA-like decoders in which every layer has its own head and FFN counts.

This file travels with a checkpoint in the per-layer layout. It adds no layer code:
each layer is the library's own class, built from `config.per_layer_config[i]`; a
sub-layer named in that entry's `skip` adds nothing to the residual stream.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class SkippedAttention(nn.Module):
    """Stands where an attention sub-layer was removed."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Returns zeros `()` that broadcast over the stream, and no attention weights."""
        return hidden_states.new_zeros(()), None


class SkippedFFN(nn.Module):
    """Stands where an FFN sub-layer was removed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns zeros `()` that broadcast over the stream."""
        return hidden_states.new_zeros(())


class PerLayerConfig:
    """Mixed into a stock config: widths vary, so checks of the global widths do not apply."""

    def validate_architecture(self) -> None:
        """Accepts any head count: `head_dim` is explicit and independent of `hidden_size`."""


class PerLayerModel:
    """Mixed into a stock causal LM: rebuilds its layers from `config.per_layer_config`."""

    def __init__(self, config: Any) -> None:
        # The stock constructor reads global widths for layers that are replaced below.
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)  # type: ignore[call-arg]
        layers: nn.ModuleList = self.model.layers  # type: ignore[attr-defined]
        for index in range(len(layers)):
            layers[index] = build_layer(type(layers[index]), config.per_layer_config[index], index)
        self.post_init()  # type: ignore[attr-defined]


def build_layer(layer_class: type, config: Any, index: int) -> nn.Module:
    """One decoder layer of the library's class, with the sub-layers in `config.skip` left out."""
    skip = set(getattr(config, "skip", None) or ())
    present = {"num_attention_heads": 1, "num_key_value_heads": 1} if "attention" in skip else {}
    for name, value in present.items():  # constructors divide by the head counts
        setattr(config, name, value)
    layer: nn.Module = layer_class(config, index)
    if "attention" in skip:
        layer.self_attn, layer.input_layernorm = SkippedAttention(), nn.Identity()
    if "ffn" in skip:
        layer.mlp, layer.post_attention_layernorm = SkippedFFN(), nn.Identity()
    return layer


class PerLayerLlamaConfig(PerLayerConfig, LlamaConfig):
    """`LlamaConfig` with per-layer widths."""

    model_type = "per_layer_llama"


class PerLayerLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    """`LlamaForCausalLM` with per-layer widths."""

    config_class = PerLayerLlamaConfig


class PerLayerMistralConfig(PerLayerConfig, MistralConfig):
    """`MistralConfig` with per-layer widths."""

    model_type = "per_layer_mistral"


class PerLayerMistralForCausalLM(PerLayerModel, MistralForCausalLM):
    """`MistralForCausalLM` with per-layer widths."""

    config_class = PerLayerMistralConfig


class PerLayerQwen2Config(PerLayerConfig, Qwen2Config):
    """`Qwen2Config` with per-layer widths."""

    model_type = "per_layer_qwen2"


class PerLayerQwen2ForCausalLM(PerLayerModel, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with per-layer widths."""

    config_class = PerLayerQwen2Config


class PerLayerQwen3Config(PerLayerConfig, Qwen3Config):
    """`Qwen3Config` with per-layer widths."""

    model_type = "per_layer_qwen3"


class PerLayerQwen3ForCausalLM(PerLayerModel, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with per-layer widths."""

    config_class = PerLayerQwen3Config


def register() -> None:
    """Makes the classes known to `AutoConfig` and `AutoModelForCausalLM` of this process."""
    for model in (
        PerLayerLlamaForCausalLM,
        PerLayerMistralForCausalLM,
        PerLayerQwen2ForCausalLM,
        PerLayerQwen3ForCausalLM,
    ):
        config_class = model.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model, exist_ok=True)
