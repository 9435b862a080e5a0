"""The run's record: `vtrans.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm_vtrans.families.base import Shape
from llm_vtrans.record.output_folder import MANIFEST_FILE
from llm_vtrans.record.redaction import redact
from llm_vtrans.record.reporting import table

CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"


def kept_units(shape: Shape) -> dict[str, Any]:
    """The `kept` entry of the manifest."""
    return {
        "hidden": shape.hidden,
        "heads": list(shape.heads),
        "ffn": list(shape.ffn),
        "head_dim": shape.head_dim,
        "removed_sublayers": [
            f"{index}.{part}"
            for index in range(len(shape.heads))
            for part, units in (("attention", shape.heads), ("ffn", shape.ffn))
            if not units[index]
        ],
        "layers": list(shape.kept_layers),
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `vtrans.json`."""
    text = redact(json.dumps(manifest, indent=2))
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def score_of_stages(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The headline score after each stage and its protocol: perplexity, or a task's own."""
    return manifest.get("perplexity") or manifest.get("score") or {}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def figures(manifest: dict[str, Any]) -> str:
    """The summary table of dense against pruned, as text."""

    def row(name: str, before: float, after: float, text: str) -> tuple[str, ...]:
        ratio = f"{after / before:.3f}" if before else "-"
        return name, text.format(before), text.format(after), ratio

    size, macs = manifest["bytes"], manifest["macs"]
    params, scores = manifest["params"], manifest["scores"]
    exported = scores.get("exported", {})  # before recovery
    return table(
        [
            ("", "dense", "pruned", "ratio"),
            row("parameters", params["before"], params["after"], "{:,}"),
            row(f"MACs ({macs['seq_len']} tokens)", macs["before"], macs["after"], "{:,}"),
            *(
                row(name.replace("_", "-") + ending, before, found[name], "{:.3f}")
                for name, before in scores["dense"].items()
                for ending, found in ((" before recovery", exported), ("", scores["pruned"]))
                if name in found
            ),
            *(
                row(f"latency, {name}", pair["dense"], pair["pruned"], "{:.3f}")
                for name, pair in manifest.get("latency", {}).items()
            ),
            row("checkpoint MB", size["before"] / 1e6, size["after"] / 1e6, "{:.3f}"),
        ]
    )
