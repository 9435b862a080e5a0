"""Networks of a pruned shape, before anybody's weights are in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from llm_vtrans.families.base import Architecture, Family, Shape
from llm_vtrans.loading.source import Source

SPREAD = 0.02  # of random weights, as usual at the start of training


def shaped_config(
    family: Family, config: Any, architecture: Architecture, shape: Shape, is_uniform: bool
) -> dict[str, Any]:
    """config.json of a network of this shape.

    Args:
        family: writes the fields.
        config: the dense model's, parsed by `transformers`.
        architecture: says whether the head is tied.
        shape: kept units.
        is_uniform: stock layout, else per-layer.

    Raises:
        UserError: the stock layout cannot express the shape.
    """
    dense = config.to_dict()
    for key in ("_name_or_path", "auto_map"):  # code of the dense model's folder is not taken over
        dense.pop(key, None)
    dense["tie_word_embeddings"] = architecture.tied_head is not None
    write = family.stock_config if is_uniform else family.per_layer_config
    return write(dense, shape)


@torch.no_grad()
def random_network(
    source: Source, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """`empty_network` with numbers in it: for timing, where what they are plays no part."""
    network = empty_network(source, config, dtype, device)
    for parameter in network.parameters():
        parameter.normal_(0, SPREAD)
    return network


def empty_network(
    source: Source, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A network in evaluation mode that holds whatever was in memory.

    Args:
        source: gives its class.
        config: by `shaped_config`.
        dtype: of the parameters.
        device: they are placed on.
    """
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict({**config})
    with no_init_weights(), torch.device(device):
        model: PreTrainedModel = source.auto_class.from_config(
            parsed, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    model.tie_weights()
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers types this wrongly
