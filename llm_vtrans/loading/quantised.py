"""Frozen weights in 4 or 8 bits (bitsandbytes) while masks are trained over them.

Only the matrices of the layers are quantised, each as soon as it is read. Masks see activations
alone, so nothing else changes, and the export is cut from the full-precision shards.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_vtrans.distributed.zero3 import is_partitioned
from llm_vtrans.errors import UserError, require
from llm_vtrans.families.base import TensorSpec

FULL = "full"


def check_form(form: str, accelerator: Accelerator) -> None:
    """Whether weights can be held in a form here.

    Raises:
        UserError: bitsandbytes is missing, or ZeRO-3 wants to slice what is quantised.
    """
    if form == FULL:
        return
    require("bitsandbytes", f"--load-in {form}", "bitsandbytes")
    if is_partitioned(accelerator):
        raise UserError(f"--load-in {form}: ZeRO-3 cannot slice quantised weights; use one of them")


def is_quantised(form: str, spec: TensorSpec, module: nn.Module) -> bool:
    """Whether a weight is held in few bits: matrices inside the layers are."""
    is_matrix = spec.sublayer is not None and len(spec.dims) == 2
    return form != FULL and is_matrix and isinstance(module, nn.Linear)


def set_quantised(
    model: nn.Module, path: str, weight: Tensor, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Puts a matrix into the linear module at `path`, which becomes one of bitsandbytes first.

    A module that is one already stays, so that hooks on it stay, too.

    Args:
        model: that holds the module.
        path: of the module.
        weight: `(rows, columns)`, any float dtype.
        form: `4bit` (NF4, blocks of 64) or `8bit` (LLM.int8, outliers above 6).
        dtype: to compute in.
        device: to hold the matrix on.
    """
    import bitsandbytes.nn as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product else
    module: Any = model.get_submodule(path)
    is_fresh = not isinstance(module, bnb.Linear4bit | bnb.Linear8bitLt)
    sizes, has_bias = (module.in_features, module.out_features), module.bias is not None
    if form == "4bit":
        if is_fresh:
            module = bnb.Linear4bit(
                *sizes, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            # The layout it takes for inference on such processors loses gradients for good.
            module.support_avx512bf16_for_cpu = False
        packed = bnb.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4")
        packed.module = module
    else:
        if is_fresh:
            module = bnb.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=6.0,
                                      device="meta")  # fmt: skip
        packed = bnb.Int8Params(weight.to(dtype), requires_grad=False, has_fp16_weights=False)
    module.weight = packed.to(device)
    if is_fresh:
        model.set_submodule(path, module)
