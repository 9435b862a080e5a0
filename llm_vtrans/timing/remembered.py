"""What was measured on a device once, kept for later runs: resumed ones must find the same."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME

from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.record.output_folder import atomic_write_text

CACHE = Path(HF_HOME) / "llm_vtrans"


def remembered(
    kind: str, what: object, device: torch.device, dtype: torch.dtype, measure: Callable[[], Any]
) -> Any:
    """A measurement, made by rank zero for all ranks where it was not made before.

    Args:
        kind: of measurement.
        what: else decides it, of JSON's types.
        device: it is made on.
        dtype: it is made in.
        measure: makes it; the result is of JSON's types.
    """
    found = None
    if PartialState().is_main_process:
        key = json.dumps([what, str(dtype), *_traits(device)], sort_keys=True, default=str)
        file = CACHE / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        found = _read(file)
        if found is None:
            found = measure()
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, json.dumps(found))
    return agreed(found)


def _traits(device: torch.device) -> list[object]:
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor()
    return [device.type, name, os.cpu_count(), torch.get_num_threads(), torch.__version__]


def _read(file: Path) -> Any:
    """What was kept, or None if there is nothing whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
