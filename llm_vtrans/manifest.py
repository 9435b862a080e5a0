"""The run's record: `vtrans.json`, `masks.safetensors` and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llm_vtrans.errors import UserError
from llm_vtrans.families.base import Shape
from llm_vtrans.masks import VIBMasks
from llm_vtrans.output_folder import MANIFEST_FILE, atomic_write_bytes
from llm_vtrans.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.reporting import table
from llm_vtrans.tasks import HEADS

MASKS_FILE = "masks.safetensors"
CARD_FILE = "README.md"
PIPELINES = {  # of the hub
    "clm": "text-generation",
    "mlm": "fill-mask",
    "classification": "text-classification",
    "regression": "text-classification",
    "multiple-choice": "multiple-choice",
    "qa": "question-answering",
}


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


def write_masks(
    folder: Path, masks: VIBMasks, plan: Mapping[str, Tensor], source_sha256: str
) -> None:
    """Writes mu and log_var of every structure, the plan and the rotation.

    Args:
        folder: to write into.
        masks: the trained masks.
        plan: `keep.*` flags and the rotation, if there is one.
        source_sha256: identity of the dense checkpoint.
    """
    tensors = dict(plan)
    for name in masks.names():
        tensors[f"mu.{name}"] = masks.mu[name].detach()
        tensors[f"log_var.{name}"] = masks.log_var[name].detach()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata key only: safetensors writes several in random order.
    atomic_write_bytes(folder / MASKS_FILE, save(tensors, {"source": source_sha256}))


def read_masks(folder: Path, source_sha256: str) -> dict[str, Tensor]:
    """Tensors of `masks.safetensors`: `mu.*`, `log_var.*`, `keep.*` and maybe `rotation`.

    Args:
        folder: an earlier run's output.
        source_sha256: identity of the dense checkpoint that they must belong to.

    Raises:
        UserError: no such file, damaged, or masks of another model.
    """
    path = folder / MASKS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            trained_on = (file.metadata() or {}).get("source")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no usable masks ({error}); name a folder that prune wrote"
        ) from error
    if trained_on != source_sha256:
        raise UserError(
            f"{path}: masks of another checkpoint; give the --model they were trained on"
        )
    return tensors


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `vtrans.json`."""
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


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
    return table(
        [
            ("", "dense", "pruned", "ratio"),
            row("parameters", params["before"], params["after"], "{:,}"),
            row(f"MACs ({macs['seq_len']} tokens)", macs["before"], macs["after"], "{:,}"),
            *(
                row(name.replace("_", "-"), before, scores["pruned"][name], "{:.3f}")
                for name, before in scores["dense"].items()
            ),
            row("checkpoint MB", size["before"] / 1e6, size["after"] / 1e6, "{:.3f}"),
        ]
    )


def model_card(manifest: dict[str, Any], figures: str) -> str:
    """The README.md of a pruned checkpoint.

    Args:
        manifest: of the run.
        figures: the summary table as text.
    """
    source, budget = manifest["source"]["name"], manifest["budget"]
    if manifest["layout"] == "stock":
        loading = "It loads in stock `transformers`, with no custom code."
        flag = ""
    else:
        loading = (
            "Every layer has its own shape: load it with `trust_remote_code=True` (the small file "
            "`per_layer_modeling.py` beside the weights), or after `import llm_vtrans`."
        )
        flag = ", trust_remote_code=True"
    auto_class = AUTO_CLASSES[HEADS[manifest["task"]]]
    protocol = manifest["perplexity" if "perplexity" in manifest else "score"]["protocol"]
    base = f"base_model: {source}\n" if source.count("/") == 1 and ".." not in source else ""
    return f"""---
library_name: transformers
pipeline_tag: {PIPELINES[manifest["task"]]}
{base}tags:
- pruning
- llm-vtrans
---
# {Path(source).name}, pruned by {100 * (1 - budget["achieved"] / budget["dense"]):.1f}%

Structured pruning with VIB masks (VTrans, arXiv:2406.05276) by `llm_vtrans`. {loading}

```python
from transformers import {auto_class}
model = {auto_class}.from_pretrained("."{flag})
```

```
{figures}
```

{manifest["headline"].replace("_", "-")}: {protocol}.
"""
