"""How the processes of a launch meet, where accelerate does not see it by itself."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.distributed_c10d import _set_pg_timeout

from llm_vtrans.errors import UserError, require

MEETING_TIMEOUT = timedelta(minutes=10)  # a process that has not come by then never will
EXPORT_TIMEOUT = timedelta(hours=2)  # other ranks wait while rank zero writes
T = TypeVar("T")


def join(**options: Any) -> Accelerator:
    """Meets all other processes of the launch.

    Args:
        options: of `Accelerator`.

    Raises:
        RuntimeError: of torch.distributed, one has not come within `MEETING_TIMEOUT`.
        UserError: the launch asks for DeepSpeed, which is not installed or not configured.
    """
    if _asks_for_deepspeed():
        require("deepspeed", "the DeepSpeed configuration of the launch", "deepspeed")
    try:
        accelerator = Accelerator(**options, **_launch_options())
    except (AttributeError, TypeError, ValueError) as error:
        if not _asks_for_deepspeed():
            raise
        config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        raise UserError(
            f"DeepSpeed configuration {config}: {error}; take a file of ds_configs/"
        ) from error
    if torch.distributed.is_initialized():
        _set_pg_timeout(EXPORT_TIMEOUT)
    return accelerator


def agreed(found: T) -> T:
    """Rank zero's value on all ranks: processors differ in how they round, and in time.

    Args:
        found: whatever pickle takes, tensors on the CPU; every rank must come here.
    """
    of_rank_zero: T = broadcast_object_list([found])[0]
    return of_rank_zero


def _launch_options() -> dict[str, Any]:
    """Arguments of `Accelerator` that join all processes of the launch, on processors too.

    Without a device accelerate names no backend unless it is told that there is none
    (`ACCELERATE_USE_CPU`), which switches DeepSpeed off: every process would then take itself
    for rank zero.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return {"kwargs_handlers": [InitProcessGroupKwargs(timeout=MEETING_TIMEOUT)]}
    return {
        "cpu": not _asks_for_deepspeed(),
        "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo", timeout=MEETING_TIMEOUT)],
    }


def _asks_for_deepspeed() -> bool:
    """Read as accelerate reads it."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
