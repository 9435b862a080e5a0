"""The training state on disk: one safetensors file, replaced as a whole, no pickles."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_vtrans.errors import UserError
from llm_vtrans.export.shard_writer import file_parts
from llm_vtrans.record.output_folder import PRIVATE_FOLDER, atomic_write
from llm_vtrans.record.reporting import METRICS_FILE, Phase, truncate_metrics
from llm_vtrans.training.loop import Objective
from llm_vtrans.training.trained_weights import FOLDER as WEIGHTS_FOLDER

STATE_FOLDER = "state"  # inside the output folder
STATE_FILE = f"{STATE_FOLDER}/training.safetensors"


@dataclass(frozen=True)
class SavedState:
    """What an unfinished run left.

    Attributes:
        step: optimizer steps done.
        tensors: parameters, optimizer and `extra`.
        phases: what the run had cost, see `Reporter.record`; older versions did not save it.
    """

    step: int
    tensors: dict[str, Tensor]
    phases: dict[str, Phase]

    @property
    def extra(self) -> dict[str, Tensor]:
        """The `extra` tensors that `save_state` was given."""
        prefix = "extra."
        return {n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}


def open_state(folder: Path, saved_step: int | None) -> None:
    """Makes the state folder ready; an earlier result beside it is not touched.

    Args:
        folder: of the run's output.
        saved_step: steps that the saved state covers; None starts anew.
    """
    state = folder / STATE_FOLDER
    if saved_step is not None:
        truncate_metrics(state, saved_step)
    else:
        remove_state(folder)
        state.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)


def remove_state(folder: Path) -> None:
    """Removes the state, and what a kill left of one that was being written."""
    state = folder / STATE_FILE
    halves = state.parent.glob(f".{state.name}.partial-*")
    shutil.rmtree(state.parent / WEIGHTS_FOLDER, ignore_errors=True)
    for path in (state, state.with_name(METRICS_FILE), *halves):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there: it is not ours to delete
        state.parent.rmdir()


def _trained(objective: Objective) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in objective.named_parameters() if p.requires_grad}


def save_state(
    folder: Path,
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Tensor],
    fingerprint: dict[str, Any],
    phases: dict[str, Any],
) -> None:
    """Replaces the saved state.

    Args:
        folder: of the run's output.
        step: optimizer steps done.
        objective: the stage, whose trained parameters are saved.
        optimizer: over them.
        extra: further tensors that a resumed run needs (the rotation, and
            in the second stage the masks).
        fingerprint: settings that a resumed run must share.
        phases: what the run has cost so far.
    """
    tensors = {f"extra.{name}": tensor for name, tensor in extra.items()}
    for name, parameter in _trained(objective).items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach()
    metadata = {
        "step": str(step),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
        "phases": json.dumps(phases),
    }
    path = folder / STATE_FILE
    path.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    atomic_write(path, file_parts(tensors, metadata))


def read_state(folder: Path, fingerprint: dict[str, Any]) -> SavedState | None:
    """The saved state, or None if there is none.

    Raises:
        UserError: the state is unreadable, or belongs to a run with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, saved = int(metadata["step"]), json.loads(metadata["fingerprint"])
        known = json.loads(metadata.get("phases", "{}"))
        phases = {name: Phase(**phase) for name, phase in known.items()}
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no usable training state ({error}); start with --overwrite"
        ) from error
    now = json.loads(json.dumps(fingerprint))
    differing = sorted(k for k in now.keys() | saved.keys() if now.get(k) != saved.get(k))
    if differing:
        key = differing[0]
        raise UserError(
            f"{path}: the unfinished run had {key} {saved.get(key)!r}, this one has "
            f"{now.get(key)!r}: give the same settings to --resume, or start with --overwrite"
        )
    return SavedState(step, tensors, phases)


def restore(
    tensors: dict[str, Tensor], objective: Objective, optimizer: torch.optim.Optimizer
) -> None:
    """Puts saved tensors back into the stage's parameters and optimizer."""
    for name, parameter in _trained(objective).items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{name}"])
        suffix = f".{name}"
        optimizer.state[parameter] = {
            key.removeprefix("optimizer.").removesuffix(suffix): (
                value if value.dim() == 0 else value.to(parameter.device)
            )
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.endswith(suffix)
        }
