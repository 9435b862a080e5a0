"""How the processes of a launch meet, where accelerate does not see it by itself."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs

EXPORT_TIMEOUT = timedelta(hours=2)  # other ranks wait while rank zero writes


def launch_options() -> dict[str, Any]:
    """Arguments of `Accelerator` that join all processes of the launch, on processors too.

    Without a device accelerate names no backend unless it is told that there is none
    (`ACCELERATE_USE_CPU`), which switches DeepSpeed off: every process would then take itself
    for rank zero.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return {"kwargs_handlers": [InitProcessGroupKwargs(timeout=EXPORT_TIMEOUT)]}
    return {
        "cpu": os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true",
        "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo", timeout=EXPORT_TIMEOUT)],
    }
