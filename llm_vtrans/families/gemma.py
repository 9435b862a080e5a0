"""Gemma: LLaMA's layers with norms that multiply by `1 + weight` and embeddings that are scaled.

The model multiplies its embeddings by the root of its own `hidden_size`, which pruning
changes; the exported table makes up for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_vtrans.families.base import Architecture, Family, Stream, TensorSpec, register
from llm_vtrans.families.gqa_decoder import describe, per_layer_config, stock_config


def _row(spec: TensorSpec) -> TensorSpec:
    if spec.stream is Stream.SCALES:
        return replace(spec, offset=1.0)
    return replace(spec, grows_with_width=True) if spec.is_lookup else spec


def _describe(config: Any) -> Architecture:
    architecture = describe(config)
    return replace(architecture, tensors=tuple(map(_row, architecture.tensors)))


GEMMA = register(
    Family(
        model_types=("gemma",),
        describe=_describe,
        stock_config=stock_config,
        per_layer_config=per_layer_config,
        ignored=(".rotary_emb.inv_freq",),
    )
)
