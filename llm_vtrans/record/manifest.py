"""The run's record: `vtrans.json`, `masks.safetensors` and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.head_basis import PREFIX, HeadBasis
from llm_vtrans.errors import UserError
from llm_vtrans.export.shard_writer import file_parts
from llm_vtrans.families.base import Architecture, Shape
from llm_vtrans.masking.by_layer import KEPT_HIDDEN
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.record.output_folder import MANIFEST_FILE, atomic_write
from llm_vtrans.record.redaction import redact
from llm_vtrans.record.reporting import table

MASKS_FILE = "masks.safetensors"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
KEEP, GATE, TUNED = "keep.", "gate.", "tuned."  # prefixes of tensors on disk


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


def tuning_tensors(tuning: Tuning) -> dict[str, Tensor]:
    """What was tuned by names, for the same file; `read_tuning` reads it."""
    return {f"{TUNED}{name}": tensor for name, tensor in tuning.state_dict().items()}


def read_tuning(
    folder: Path, architecture: Architecture, masks: Mapping[str, Tensor], plan: PrunePlan
) -> Tuning:
    """What a run tuned, on the CPU.

    Args:
        folder: the run's output.
        architecture: table of its model, after rotation if there is one.
        masks: by `read_masks`.
        plan: that it was tuned for, one of these.
    """
    tuning = Tuning(architecture, is_rotated="rotation" in masks)
    with safe_open(folder / MASKS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(f"{TUNED}{name}") for name in tuning.state_dict()}
    tuning.recall(tensors, plan.hard().get(KEPT_HIDDEN))
    return tuning


def write_masks(folder: Path, tensors: Mapping[str, Tensor], source_sha256: str) -> None:
    """Writes what a search found.

    Args:
        folder: to write into.
        tensors: `mu.*` and `log_var.*` of every structure, the plan's (`plan_tensors`), the
            rotation and the tuning.
        source_sha256: identity of the dense checkpoint.
    """
    atomic_write(folder / MASKS_FILE, file_parts(tensors, {"source": source_sha256}))


def plan_tensors(plan: PrunePlan) -> dict[str, Tensor]:
    """A plan by names, for a file of tensors; `saved_plan` reads it."""
    tensors = {f"{KEEP}{name}": keep.to(torch.uint8) for name, keep in plan.keep.items()}
    # Copies: a gate may be the very `mu` that goes into the same file.
    tensors |= {f"{GATE}{name}": gate.clone() for name, gate in plan.gate.items()}
    if plan.head_dim is not None and plan.basis is not None:
        kept = {role: maps[:, :, : plan.head_dim] for role, maps in plan.basis.maps.items()}
        tensors |= {f"{PREFIX}{role}": maps.contiguous() for role, maps in kept.items()}
    return tensors


def saved_plan(tensors: Mapping[str, Tensor]) -> PrunePlan:
    """The plan among the tensors of a file; of the heads' basis, what was kept."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    basis = HeadBasis.saved(tensors)
    keep = {name: keep.bool() for name, keep in under(KEEP).items()}
    return PrunePlan(keep, under(GATE), None if basis is None else basis.width, basis)


def read_masks(folder: Path, source_sha256: str) -> dict[str, Tensor]:
    """Tensors of `masks.safetensors` but the tuning's, as `write_masks` names them.

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
            names = [name for name in file.keys() if not name.startswith(TUNED)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no usable masks ({error}); name a folder that prune wrote"
        ) from error
    if trained_on != source_sha256:
        raise UserError(
            f"{path}: masks of another checkpoint; give the --model they were trained on"
        )
    return tensors


def check_masks(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[tuple[int, ...]]], what: str
) -> None:
    """Masks must have the tensors that the model needs, in the right shapes and finite.

    Args:
        tensors: as read.
        expected: for each name the shapes that it may have.
        what: names their origin in the message.

    Raises:
        UserError: one is missing or cannot be used.
    """
    for name, shapes in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) not in shapes:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UserError(
                f"{what}: {name} is {found} where this model has {shapes[0]}; "
                "the masks are damaged or of another version: train them again"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{what}: {name} holds no finite numbers; train the masks again")


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
