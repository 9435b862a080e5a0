"""ZeRO-3: the frozen weights in slices over the ranks; DeepSpeed gathers a layer while it runs.

Only the model is DeepSpeed's. Masks, multipliers and tuning with their optimizer are small, must
stay float32 whatever the model's dtype, and so are replicated under every configuration: stages 1
and 2, which partition the optimizer and the gradients of trained weights, find nothing to
partition while the weights are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from llm_vtrans.errors import UserError


def is_partitioned(accelerator: Accelerator) -> bool:
    """Whether the run was launched with a DeepSpeed configuration of stage 3."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def is_offloaded(accelerator: Accelerator) -> bool:
    """Whether the slices of parameters lie in host memory or on disk."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.offload_param_device not in (None, "none")


def configure(accelerator: Accelerator, dtype: torch.dtype, batch_size: int) -> None:
    """Completes DeepSpeed's configuration; models built from then on are born partitioned.

    Args:
        accelerator: launched with or without DeepSpeed; without, nothing happens.
        dtype: of the model's parameters.
        batch_size: sequences per rank and micro-batch.

    Raises:
        UserError: the launcher's mixed precision contradicts `dtype`.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"mixed_precision {accelerator.mixed_precision} with DeepSpeed: masks stay float32 and "
            "--dtype sets the model's dtype; remove mixed_precision from the launch file"
        )
    config: dict[str, Any] = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["bf16"] = {"enabled": dtype is torch.bfloat16}
    config["fp16"] = {"enabled": dtype is torch.float16}
    plugin.set_deepspeed_weakref()  # where transformers looks when it builds a model


def attach(accelerator: Accelerator, root: nn.Module) -> None:
    """Lets DeepSpeed gather each layer of a partitioned model while it runs.

    Args:
        accelerator: as launched.
        root: what one training step calls once; DeepSpeed learns the order of layers of one
            such call, teacher, student and backward pass, and fetches ahead of it.
    """
    if is_partitioned(accelerator):
        accelerator.prepare(root)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Whole parameters inside the context; what rank zero wrote into them reaches all ranks."""
    sliced = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sliced:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        sliced, modifier_rank=0
    )
    return context


def is_writer(parameter: nn.Parameter) -> bool:
    """Whether this rank gives the values of a gathered parameter."""
    return not hasattr(parameter, "ds_id") or torch.distributed.get_rank() == 0
