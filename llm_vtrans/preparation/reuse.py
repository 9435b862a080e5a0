"""REUSE: masks of an earlier run in place of training (`--masks`)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.errors import UserError
from llm_vtrans.families import Architecture
from llm_vtrans.families.base import Axis
from llm_vtrans.record.masks_file import check_masks, read_masks
from llm_vtrans.report.record import RunRecord
from llm_vtrans.training.search import initial_shapes


def reused_masks(
    args: PruneArguments, architecture: Architecture, uses_rotation: bool, checkpoint: str
) -> dict[str, Tensor]:
    """Tensors of the run that `--masks` names, or none.

    Args:
        args: of this run.
        architecture: table of the dense model, as masks see it.
        uses_rotation: whether this run rotates the stream.
        checkpoint: SHA-256 of the dense checkpoint.

    Raises:
        UserError: they are damaged, or were trained for another model or with other structures.
    """
    if args.masks is None:
        return {}
    folder = Path(args.masks)
    trained = read_masks(folder, checkpoint)
    variant = RunRecord.read(folder).manifest["settings"].get("variant", "faster")
    if variant != "faster":
        raise UserError(
            f"--masks {folder}: its weights were trained with the masks (--variant {variant}) "
            "and only the kept ones were written; prune anew for another budget"
        )
    structures = {n[3:] for n in trained if n.startswith("mu.")}
    if structures != set(args.structures()):
        raise UserError(
            f"--masks {args.masks}: trained with --prune {','.join(sorted(structures))}; "
            f"give the same instead of {args.prune}"
        )
    if ("rotation" in trained) != uses_rotation:
        given = "pca" if "rotation" in trained else "none"
        raise UserError(f"--masks {args.masks}: trained with --rotate {given}; give it too")
    shapes = _shapes(architecture, args.structures())
    if uses_rotation:
        hidden = architecture.num_units[Axis.HIDDEN]
        shapes["rotation"] = [(hidden, hidden)]
    check_masks(trained, shapes, f"--masks {args.masks}")
    return trained


def _shapes(
    architecture: Architecture, structures: tuple[str, ...]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes that masks may have: those of either layout serve both."""
    layouts = [initial_shapes(architecture, structures, uniform) for uniform in (True, False)]
    return {
        f"{part}.{name}": [layout[name] for layout in layouts]
        for part in ("mu", "log_var")
        for name in structures
    }
