"""What a run found: its masks and plan in one file, what was tuned in another.

They lie in a folder of their own: vLLM and SGLang take every `*.safetensors` beside `config.json`
for weights of the model, unless an index says otherwise. The masks make other sizes (`--masks`).
The tuning is in the weights already and serves checks alone, so it is not published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm_vtrans.allocation.allocate import PrunePlan
from llm_vtrans.basis.head_basis import PREFIX, HeadBasis
from llm_vtrans.errors import UserError, blame
from llm_vtrans.export.shard_writer import file_parts
from llm_vtrans.loading.source import Source
from llm_vtrans.masking.by_layer import KEPT_HIDDEN
from llm_vtrans.masking.tuning import Tuning
from llm_vtrans.record.output_folder import atomic_write, what_to_name

MASKS_FILE, TUNING_FILE = "vtrans/masks.safetensors", "vtrans/tuning.safetensors"
KEEP, GATE = "keep.", "gate."  # prefixes of tensors on disk


def write_found(
    folder: Path, tensors: Mapping[str, Tensor], tuning: Tuning, source_sha256: str
) -> None:
    """Writes what a run found.

    Args:
        folder: of its result.
        tensors: `mu.*` and `log_var.*` of every structure, the plan's (`plan_tensors`) and the
            rotation.
        tuning: folded into the weights already.
        source_sha256: identity of the dense checkpoint.
    """
    (folder / MASKS_FILE).parent.mkdir()
    metadata = {"source": source_sha256}
    atomic_write(folder / MASKS_FILE, file_parts(tensors, metadata))
    atomic_write(folder / TUNING_FILE, file_parts(tuning.state_dict(), metadata))


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
    """The tensors that `write_found` was given, of a run's masks.

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
        raise UserError(f"{path}: no usable masks ({error}); {what_to_name(folder)}") from error
    if trained_on != source_sha256:
        raise UserError(
            f"{path}: masks of another checkpoint; give the --model they were trained on"
        )
    return tensors


@dataclass(frozen=True)
class Found:
    """What a run found about a model.

    Attributes:
        rotation: `(hidden_size, hidden_size)`, or None.
        plan: kept units and gates.
        tuning: for that plan, on the CPU.
    """

    rotation: Tensor | None
    plan: PrunePlan
    tuning: Tuning


def read_found(folder: Path, source: Source) -> Found:
    """Reads both files of a run whose weights stayed frozen.

    Args:
        folder: the run's output.
        source: its dense model.

    Raises:
        UserError: as `read_masks`.
    """
    masks = read_masks(folder, source.checkpoint.sha256)
    plan, rotation = saved_plan(masks), masks.get("rotation")
    tuning = Tuning(source.architecture, is_rotated=rotation is not None)
    with blame(folder / TUNING_FILE, "it is damaged or of another version: prune again"):
        tuning.recall(load_file(folder / TUNING_FILE), plan.hard().get(KEPT_HIDDEN))
    return Found(rotation, plan, tuning)


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
