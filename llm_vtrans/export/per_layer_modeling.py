"""Transformers in which every layer has its own head and FFN counts.

This file travels with a checkpoint in the per-layer layout. It adds no layer code:
each layer is the library's own class, built from `config.per_layer_config[i]`; a
sub-layer named in that entry's `skip` adds nothing to the residual stream (with a
post-norm, it hands the stream on).
"""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Ending of a model class's name -> the Auto class that loads it.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


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


class PassedAttention(nn.Module):
    """Stands where an attention sub-layer was removed with its post-norm."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Returns the stream, and no attention weights."""
        return hidden_states, None


class PassedFFN(nn.Module):
    """Stands where an FFN sub-layer was removed with its post-norm."""

    def forward(self, _: Tensor, hidden_states: Tensor) -> Tensor:
        """Returns the stream."""
        return hidden_states


class PerLayerConfig:
    """Mixed into a stock config: widths vary, so checks of the global widths do not apply."""

    def validate_architecture(self) -> None:
        """Accepts any head count: `head_dim` is explicit and independent of `hidden_size`."""


class PerLayerModel:
    """Mixed into a stock model: rebuilds its layers from `config.per_layer_config`."""

    layers_path = "model.layers"

    def __init__(self, config: Any) -> None:
        # The stock constructor reads global widths for layers that are replaced below.
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)  # type: ignore[call-arg]
        layers: nn.ModuleList = self.get_submodule(self.layers_path)  # type: ignore[attr-defined]
        for index in range(len(layers)):
            layer_config = config.per_layer_config[index]
            skip = set(getattr(layer_config, "skip", None) or ())
            if "ffn" in skip:  # constructors warn of empty matrices
                layer_config.intermediate_size = 1
            layers[index] = self.build_layer(type(layers[index]), layer_config, index, skip)
        self.post_init()  # type: ignore[attr-defined]

    def build_layer(self, layer_class: type, config: Any, index: int, skip: set[str]) -> nn.Module:
        """One layer of the library's class, with the sub-layers in `skip` left out."""
        if "attention" in skip:  # constructors divide by the head counts
            config.num_attention_heads = config.num_key_value_heads = 1
        layer: nn.Module = layer_class(config, index)
        if "attention" in skip:
            layer.self_attn, layer.input_layernorm = SkippedAttention(), nn.Identity()
        if "ffn" in skip:
            layer.mlp, layer.post_attention_layernorm = SkippedFFN(), nn.Identity()
        return layer


class PerLayerGPT2(PerLayerModel):
    """GPT-2's layers."""

    layers_path = "transformer.h"

    def build_layer(self, layer_class: type, config: Any, index: int, skip: set[str]) -> nn.Module:
        """One block with heads of `config.head_dim`."""
        heads, config.num_attention_heads = config.num_attention_heads, 1
        layer: nn.Module = layer_class(config, index)
        if "attention" in skip:
            layer.attn, layer.ln_1 = SkippedAttention(), nn.Identity()
        else:
            attention: Any = layer.attn
            width = heads * config.head_dim
            attention.num_heads, attention.head_dim = heads, config.head_dim
            attention.split_size, attention.scaling = width, config.head_dim**-0.5
            attention.c_attn = Conv1D(3 * width, config.hidden_size)
            attention.c_proj = Conv1D(config.hidden_size, width)
        if "ffn" in skip:
            layer.mlp, layer.ln_2 = SkippedFFN(), nn.Identity()
        return layer


class PerLayerBert(PerLayerModel):
    """BERT's layers, which have post-norms."""

    layers_path = "bert.encoder.layer"

    def build_layer(self, layer_class: type, config: Any, index: int, skip: set[str]) -> nn.Module:
        """One layer with heads of `config.head_dim`."""
        heads, config.num_attention_heads = config.num_attention_heads, 1
        layer: Any = layer_class(config, index)
        if "attention" in skip:
            layer.attention = PassedAttention()
        else:
            attention, width = layer.attention.self, heads * config.head_dim
            attention.num_attention_heads, attention.attention_head_size = heads, config.head_dim
            attention.all_head_size, attention.scaling = width, config.head_dim**-0.5
            for name in ("query", "key", "value"):
                setattr(attention, name, nn.Linear(config.hidden_size, width))
            layer.attention.output.dense = nn.Linear(width, config.hidden_size)
        if "ffn" in skip:
            layer.intermediate, layer.output = nn.Identity(), PassedFFN()
        return layer


class PerLayerRoberta(PerLayerBert):
    """RoBERTa's layers: BERT's."""

    layers_path = "roberta.encoder.layer"


class PerLayerBase(PerLayerModel):
    """A decoder without a head."""

    layers_path = "layers"


class Headed:
    """Mixed into a stock model that gets its decoder from `AutoModel`: that is `PerLayerBase`."""


DECODER = {
    "Model": PerLayerBase,
    "ForCausalLM": PerLayerModel,
    "ForSequenceClassification": Headed,
}
ENCODER_HEADS = (
    "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForQuestionAnswering",
)  # fmt: skip
# Family -> ending of the stock class -> what is mixed into it.
FAMILIES: dict[str, dict[str, type]] = {
    "Llama": DECODER,
    "Mistral": DECODER,
    "Qwen2": DECODER,
    "Qwen3": DECODER,
    "Gemma": DECODER,
    "GPT2": dict.fromkeys(("LMHeadModel", "ForSequenceClassification"), PerLayerGPT2),
    "Bert": dict.fromkeys(ENCODER_HEADS, PerLayerBert),
    "Roberta": dict.fromkeys(ENCODER_HEADS, PerLayerRoberta),
}


def _derive(stem: str, mixins: dict[str, type]) -> dict[str, type]:
    """`PerLayer*Config` and `PerLayer*For*` of one family, by name."""
    stock = getattr(transformers, f"{stem}Config")
    fields: dict[str, Any] = {
        "__doc__": f"`{stock.__name__}` with per-layer widths.",
        "model_type": f"per_layer_{stock.model_type}",
    }
    # A config that is saved is checked by what `strict` found, in the stock class or again here.
    config: Any = strict(type(f"PerLayer{stem}Config", (PerLayerConfig, stock), fields))
    classes = {config.__name__: config}
    for head, mixin in mixins.items():
        stock = getattr(transformers, f"{stem}{head}")
        fields = {
            "__doc__": f"`{stock.__name__}` with per-layer widths.",
            "config_class": config,
        }
        model = type(f"PerLayer{stock.__name__}", (mixin, stock), fields)
        classes[model.__name__] = model
    return classes


CLASSES = {
    name: derived
    for stem, mixins in FAMILIES.items()
    for name, derived in _derive(stem, mixins).items()
}
globals().update(CLASSES)  # loaders look classes up by name in this module


def auto_class_of(name: str) -> str:
    """The Auto class that loads a model class, `AutoModel` where it has no known head."""
    found = (auto for ending, auto in AUTO_CLASSES.items() if name.endswith(ending))
    return next(found, "AutoModel")


def register() -> None:
    """Makes the classes known to the Auto classes; what they save carries this file."""
    known: Any
    for name, known in CLASSES.items():
        if name.endswith("Config"):
            transformers.AutoConfig.register(known.model_type, known, exist_ok=True)
            known.register_for_auto_class()
            continue
        auto = auto_class_of(name)
        getattr(transformers, auto).register(known.config_class, known, exist_ok=True)
        known.register_for_auto_class(auto)


register()  # on import, as a class with a head may look its decoder up
