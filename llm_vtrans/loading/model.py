"""LOAD: checked checkpoint -> frozen model, one tensor at a time from its shards."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm_vtrans.basis.rotation import FinalNorm, bias_of, rotate_tensor, through_reader
from llm_vtrans.distributed.ranks import agreed
from llm_vtrans.distributed.zero3 import gathered, is_writer
from llm_vtrans.errors import UserError, blame
from llm_vtrans.families.base import Architecture, TensorSpec
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.loading.quantised import FULL, is_quantised, set_quantised
from llm_vtrans.loading.source import RESTORE, Source
from llm_vtrans.loading.widened import widen_where_slow

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weights:
    """The values that a model's parameters get.

    Attributes:
        source: checked checkpoint.
        architecture: the table, after rotation if that takes a tied head off the embedding.
        basis: rotation `(hidden_size, hidden_size)` float32, done tensor by tensor, or None.
        form: `full`, or how bitsandbytes holds the layers' matrices: `4bit` or `8bit`.
    """

    source: Source
    architecture: Architecture
    basis: Tensor | None = None
    form: str = FULL

    def read(self, name: str, device: torch.device) -> Tensor:
        """One tensor from the shards on a device, rotated.

        Raises:
            UserError: it is NaN or infinite somewhere.
        """
        checkpoint = self.source.checkpoint
        stored = stored_name(name, checkpoint, self.architecture)
        weight = checkpoint.read(stored, device)
        # Extremes are NaN where any value is; of all such tests this one makes no copy.
        if not all(math.isfinite(extreme) for extreme in weight.aminmax()):
            raise UserError(
                f"{checkpoint.tensors[stored].file}: {stored} holds NaN or infinite values: "
                "the checkpoint is damaged"
            )
        if self.basis is None:
            return weight
        spec, layer = self.architecture.named_tensors()[name]
        norm = None
        if spec.norm is not None:
            norm = norm_weight(checkpoint, self.architecture, spec.norm, layer, device)
        weight = with_norm_bias(weight, checkpoint, self.architecture, spec, layer)
        return rotate_tensor(weight, spec, self.basis.to(device), norm)


def load_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    architecture: Architecture | None = None,
    form: str = FULL,
) -> PreTrainedModel:
    """Builds the model without storage and fills it tensor by tensor.

    Host memory peaks at the model in `dtype` plus one tensor. Under ZeRO-3 the model is born in
    slices, rank zero alone reads the files, and no rank holds more than a whole tensor.

    Args:
        source: checked checkpoint.
        dtype: of the parameters.
        device: they are placed on.
        architecture: the table after rotation, if that takes a tied head off the embedding.
        form: in which the layers' matrices are held.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    architecture = architecture or source.architecture
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = architecture.tied_head is not None
    storage = nullcontext() if is_deepspeed_zero3_enabled() else _no_storage()
    with blame(source.checkpoint.folder / "config.json", RESTORE), storage, no_init_weights():
        model: PreTrainedModel = source.auto_class.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    fill_model(model, Weights(source, architecture, form=form), dtype, device)
    model.tie_weights()
    widen_where_slow(model, device)
    model.to(device)  # type: ignore[arg-type]  # the buffers; transformers types this wrongly
    return model.eval()


def _no_storage() -> AbstractContextManager[None]:
    return init_empty_weights(include_buffers=False)


def fill_model(
    model: PreTrainedModel, weights: Weights, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives every parameter its values, one tensor in memory at a time.

    Args:
        model: with parameters without storage, sliced, or to be replaced.
        weights: their values.
        dtype: of the parameters.
        device: they are placed on.

    Raises:
        UserError: a weight is NaN or infinite; on every rank, whoever read it.
    """
    damaged = ""
    for name, (spec, _) in weights.architecture.named_tensors().items():
        path, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(name)
        with gathered([parameter]):
            if damaged or not is_writer(parameter):
                continue
            in_few_bits = is_quantised(weights.form, spec, model.get_submodule(path))
            try:  # bitsandbytes quantises what comes from the processor
                weight = weights.read(name, torch.device("cpu") if in_few_bits else device)
            except UserError as error:
                damaged = str(error)
                continue
            if in_few_bits:
                set_quantised(model, path, weight, weights.form, dtype, device)
            elif parameter.is_meta:
                filled = nn.Parameter(weight.to(device, dtype), requires_grad=False)
                setattr(model.get_submodule(path), leaf, filled)
            else:
                with torch.no_grad():
                    parameter.copy_(weight)
    damaged = agreed(damaged)  # rank zero may have read for all
    if damaged:
        raise UserError(damaged)


def norm_weight(
    checkpoint: Checkpoint,
    architecture: Architecture,
    name: str,
    layer: int | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """What a norm multiplies by, `(hidden_size,)`.

    Args:
        checkpoint: the dense shards.
        architecture: their table.
        name: of the norm's weight, in layers a template.
        layer: index of the layer, None outside.
        device: to read it to.
    """
    return checkpoint.read(name.format(layer), device) + architecture.row(name).offset


def norm_bias(
    checkpoint: Checkpoint,
    architecture: Architecture,
    name: str,
    layer: int | None = None,
    device: torch.device = CPU,
) -> Tensor | None:
    """What a norm adds, `(hidden_size,)`; None if nothing. Its arguments are `norm_weight`'s."""
    if not any(spec.name == bias_of(name) for spec in architecture.tensors):
        return None
    return checkpoint.read(bias_of(name).format(layer), device)


def final_norm(checkpoint: Checkpoint, architecture: Architecture, basis: Tensor) -> FinalNorm:
    """What a tied head needs after a rotation `(hidden_size, hidden_size)`."""
    name = architecture.final_norm
    weight = norm_weight(checkpoint, architecture, name)
    return FinalNorm.rotated(weight, norm_bias(checkpoint, architecture, name), basis)


def with_norm_bias(
    weight: Tensor,
    checkpoint: Checkpoint,
    architecture: Architecture,
    spec: TensorSpec,
    layer: int | None,
) -> Tensor:
    """A tensor and, if it is a reader's bias, what that makes of the bias of the norm in front.

    Args:
        weight: as the checkpoint has it.
        checkpoint: the dense shards.
        architecture: their table.
        spec: the tensor's row.
        layer: index of the layer, None outside.
    """
    if spec.reader is None:
        return weight
    reader = architecture.row(spec.reader)
    assert reader.norm is not None, reader.name
    bias = norm_bias(checkpoint, architecture, reader.norm, layer, weight.device)
    assert bias is not None, reader.norm
    matrix = checkpoint.read(reader.name.format(layer), weight.device)
    return weight.float() + through_reader(matrix, reader, bias)


def stored_name(name: str, checkpoint: Checkpoint, architecture: Architecture) -> str:
    """Where a tensor is read from: a head that was tied comes from the embedding."""
    if name in checkpoint.tensors:
        return name
    return architecture.embedding.name
