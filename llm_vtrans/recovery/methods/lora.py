"""RECOVER by low-rank adapters (LoRA, arXiv:2106.09685) that distil from the dense network.

Every linear layer but the output head gets `W + (alpha / r) B A`, of which `A (r, in)` and
`B (out, r)` learn while `W` is frozen; at the end the sum is written in the place of `W`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_vtrans.distributed.zero3 import gathered, is_writer
from llm_vtrans.errors import require
from llm_vtrans.export.pruning import Pruning
from llm_vtrans.recovery.training import RecoveryRun, distil
from llm_vtrans.tasks.encoding import Examples

IS_FLOAT32, IS_GENERAL, RUNS_SLICED = False, True, True
RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-3
ADAPTER = "recovery"


def check() -> None:
    """Whether peft is there.

    Raises:
        UserError: it is not.
    """
    require("peft", "--recover lora", "recover")


def recover(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    pruning: Pruning,
    examples: Examples,
    run: RecoveryRun,
) -> PreTrainedModel:
    """Trains adapters and merges them; as `llm_vtrans.recovery.methods.Recover`."""
    check()
    tuner = with_adapters(pruned, run.settings.seed)
    distil(dense, pruned, parameters(tuner), LEARNING_RATE, examples, run)
    return merged(tuner)


def with_adapters(model: PreTrainedModel, seed: int) -> Any:
    """Puts fresh adapters, whose sum is zero, into a model, which is changed in place.

    Returns:
        peft's `LoraModel` around it.
    """
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of transposed storage, which it handles
        torch.manual_seed(seed)  # the same on every rank
        tuner = LoraModel(model, config, ADAPTER)
    for layer in _layers(tuner):
        for name in ("lora_A", "lora_B"):
            # Not modules of the model any more: ZeRO-3 would cut them into slices.
            layer.__dict__[name] = layer._modules.pop(name).float()
    return tuner


def parameters(tuner: Any) -> list[nn.Parameter]:
    """All `A` and `B`, float32."""
    maps = (getattr(layer, n)[ADAPTER] for layer in _layers(tuner) for n in ("lora_A", "lora_B"))
    return [parameter for one in maps for parameter in one.parameters()]


@torch.no_grad()
def merged(tuner: Any) -> PreTrainedModel:
    """The model without adapters, their sums added to its weights."""
    for layer in _layers(tuner):
        weight = layer.get_base_layer().weight
        delta = layer.get_delta_weight(ADAPTER)
        with gathered([weight]):
            if is_writer(weight):
                weight.copy_(weight.float() + delta)
    model: PreTrainedModel = tuner.unload()
    return model


def _layers(tuner: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in tuner.modules() if isinstance(module, LoraLayer)]
