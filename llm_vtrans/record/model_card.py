"""The README.md of a pruned checkpoint, with the metadata that the hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from llm_vtrans.record.manifest import score_of_stages

FRONT = "---\n"
PIPELINES = {  # of the hub, by task
    "clm": "text-generation",
    "mlm": "fill-mask",
    "classification": "text-classification",
    "regression": "text-classification",
    "multiple-choice": "multiple-choice",
    "qa": "question-answering",
}


def front_matter(card: str) -> dict[str, Any]:
    """The YAML block at the top of a card, empty if there is none that can be read."""
    if not card.startswith(FRONT) or (end := card.find("\n---", len(FRONT))) < 0:
        return {}
    try:
        block = yaml.safe_load(card[len(FRONT) : end])
    except yaml.YAMLError:
        return {}
    return block if isinstance(block, dict) else {}


def base_license(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Licence of a dense checkpoint by its card, else by its config; empty if neither says.

    Args:
        folder: the dense checkpoint.
        config: its parsed `config.json`.

    Returns:
        `license` and, where they are given, `license_name` and `license_link`.
    """
    card = folder / "README.md"
    try:
        block = front_matter(card.read_text(encoding="utf-8")) if card.is_file() else {}
    except (OSError, UnicodeDecodeError):
        block = {}
    found = block if block.get("license") else config
    keys = ("license", "license_name", "license_link")
    return {key: str(found[key]) for key in keys if found.get("license") and found.get(key)}


def hub_id(name: str) -> str | None:
    """A model's name if it is one of the hub (`owner/name`), else None."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    return None if is_path else name


def metadata(manifest: dict[str, Any], scores: dict[str, Any]) -> ModelCardData:
    """The card's metadata, results in the hub's model-index format.

    Args:
        manifest: of the run.
        scores: `results` of `llm-vtrans score`, empty if the model was not scored.
    """
    source = manifest["source"]
    base = hub_id(source["name"])
    license_fields: dict[str, Any] = source.get("license") or {}
    # No `base_model_relation`: the hub knows none for pruning.
    extra: dict[str, Any] = {"base_model": base} if base else {}
    return ModelCardData(
        model_name=title(manifest),
        library_name="transformers",
        pipeline_tag=manifest.get("pipeline_tag", "text-generation"),
        tags=["pruning", "structured-pruning", "vib", "llm-vtrans"],
        eval_results=list(_results(manifest, scores)),
        ignore_metadata_errors=False,
        **license_fields,
        **extra,
    )


def _results(manifest: dict[str, Any], scores: dict[str, Any]) -> list[EvalResult]:
    task = manifest.get("pipeline_tag", "text-generation")
    data = str(manifest["settings"]["data"])
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data if hub_id(data) else "text",
            dataset_name=f"{Path(data).stem}, held out",
            metric_type=metric,
            metric_value=round(value, 6),
            metric_name=str(score_of_stages(manifest)["protocol"]),
        )
        for metric, value in manifest["scores"]["pruned"].items()
        if math.isfinite(value)
    ]
    for name, result in scores.items():
        for metric, columns in result.get("metrics", {}).items():
            value = (columns.get("pruned") or columns.get("model") or {}).get("value")
            if value is not None:
                results.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=name.split(":")[0],
                        dataset_name=name,
                        metric_type=metric.split(" ")[0],
                        metric_value=round(value, 6),
                        metric_name=metric,
                    )
                )
    return results


def title(manifest: dict[str, Any]) -> str:
    """What the card calls the model."""
    params = manifest["params"]
    share = 100 * (1 - params["after"] / params["before"])
    return f"{Path(manifest['source']['name']).name}, pruned by {share:.1f}%"


def _plain(text: str) -> str:
    """Text that may come from outside as one line of Markdown that shows it literally."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]<>!#|~])", r"\\\1", line)


def _code(text: str) -> str:
    """Text inside code marks, which it may not close."""
    return str(text).replace("`", "'")


def model_card(manifest: dict[str, Any], figures: str, scores: dict[str, Any] | None = None) -> str:
    """The whole README.md.

    Args:
        manifest: of the run.
        figures: the summary table as text.
        scores: `results` of `llm-vtrans score`, if the model was scored.
    """
    if manifest["layout"] == "stock":
        loading = "It loads in stock `transformers`, with no custom code."
        flag = ""
    else:
        loading = (
            "Every layer has its own shape: load it with `trust_remote_code=True` (the small file "
            "`per_layer_modeling.py` beside the weights), or after `import llm_vtrans`."
        )
        flag = ", trust_remote_code=True"
    license_name = (manifest["source"].get("license") or {}).get("license")
    terms = (
        f"The licence is the dense model's: `{_code(license_name)}`."
        if license_name
        else "The dense model names no licence; its terms hold for this one too."
    )
    auto_class = manifest.get("auto_class", "AutoModelForCausalLM")
    headline = manifest.get("headline", "perplexity").replace("_", "-")
    return f"""---
{metadata(manifest, scores or {}).to_yaml()}
---
# {_plain(title(manifest))}

Structured pruning with VIB masks (VTrans, arXiv:2406.05276) by `llm_vtrans`. {loading}

```python
from transformers import {auto_class}
model = {auto_class}.from_pretrained("."{flag})
```

```
{_code(figures)}
```

{_plain(headline.capitalize())}: {_plain(score_of_stages(manifest)["protocol"])}. {terms}

`vtrans.json` states counts, kept units, settings and hashes (`llm-vtrans verify` checks them);
`recipe.yaml` makes it anew: `llm-vtrans prune --config recipe.yaml`.
"""
