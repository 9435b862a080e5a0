"""What the adapters share in writing the configs of pruned models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.families.base import Shape, Sublayer

# The released per-layer loader (llm_vtrans/export/per_layer_modeling.py) travels under this name.
PER_LAYER_MODULE = "per_layer_modeling"


@dataclass(frozen=True)
class Fields:
    """How a family's config calls its widths."""

    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    ffn: str = "intermediate_size"
    layers: str = "num_hidden_layers"


def coupled_stock_config(config: dict[str, Any], shape: Shape, names: Fields) -> dict[str, Any]:
    """A config that knows no `head_dim`: heads times their width is the hidden size.

    Raises:
        UserError: the shape does not keep to that.
    """
    layer = shape.kept_layers[0]
    heads = shape.heads[layer]
    head_dim = shape.head_dim or config[names.hidden] // config[names.heads]
    if heads * head_dim != shape.hidden:
        raise UserError(
            f"{heads} heads of {head_dim} in a hidden size of {shape.hidden}: config.json of "
            f"{config['model_type']} cannot say so; use --layout per-layer"
        )
    widths = (shape.hidden, heads, shape.ffn[layer], len(shape.kept_layers))
    keys = (names.hidden, names.heads, names.ffn, names.layers)
    return config | dict(zip(keys, widths, strict=True))


def coupled_per_layer_config(config: dict[str, Any], shape: Shape, names: Fields) -> dict[str, Any]:
    """The same family with one head count and one FFN width per layer, `head_dim` as it was."""
    new = config | {
        names.hidden: shape.hidden,
        # Stock constructors demand that the heads divide the hidden size; no layer uses this.
        names.heads: 1,
        names.ffn: max(max(shape.ffn), 1),
        names.layers: len(shape.kept_layers),
        "head_dim": config[names.hidden] // config[names.heads],
        "per_layer_config": {
            str(position): {
                names.heads: shape.heads[layer],
                names.ffn: shape.ffn[layer],
                "skip": skipped(shape, layer),
            }
            for position, layer in enumerate(shape.kept_layers)
        },
    }
    return per_layer_names(new)


def skipped(shape: Shape, layer: int) -> list[str]:
    """Names of the sub-layers that a kept layer lacks."""
    return [part.value for part in Sublayer if not shape.units(part)[layer]]


def per_layer_names(config: dict[str, Any]) -> dict[str, Any]:
    """Renames a config's class and model type to those of the per-layer loader."""
    model_class = config["architectures"][0]
    ending = next(e for e in AUTO_CLASSES if model_class.endswith(e))
    stem = model_class.removesuffix(ending)
    return config | {
        "model_type": f"per_layer_{config['model_type']}",
        "architectures": [f"PerLayer{model_class}"],
        "auto_map": {
            "AutoConfig": f"{PER_LAYER_MODULE}.PerLayer{stem}Config",
            AUTO_CLASSES[ending]: f"{PER_LAYER_MODULE}.PerLayer{model_class}",
        },
    }
