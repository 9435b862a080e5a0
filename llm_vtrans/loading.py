"""LOAD: checkpoint folder -> frozen model, one tensor at a time from its shards."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm_vtrans.checkpoint import Checkpoint
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError
from llm_vtrans.families import Architecture, Family, family_for
from llm_vtrans.zero3 import gathered, is_writer

EMBEDDED = "embedded"
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """A dense checkpoint that was checked against its family's tensor table.

    Attributes:
        name: as the user gave it.
        checkpoint: its shards.
        config: parsed by `transformers`.
        family: its adapter.
        architecture: its tensor table.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    family: Family
    architecture: Architecture


def open_source(name: str, revision: str | None = None) -> Source:
    """Finds a model and checks config and shard headers, reading no weights.

    Args:
        name: `embedded`, a local folder, or a hub id (the token comes from the environment).
        revision: of a hub model.

    Raises:
        UserError: not found, damaged, or of a family that is not supported.
    """
    checkpoint = Checkpoint.open(_local_folder(name, revision))
    family = family_for(str(checkpoint.config.get("model_type")))
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except Exception as error:  # config validation raises many types; all are the file's fault
        raise UserError(f"{checkpoint.folder / 'config.json'}: {_one_line(error)}") from error
    architecture = family.describe(config)
    _check_tensors(checkpoint, architecture, family)
    return Source(name, checkpoint, config, family, architecture)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _local_folder(name: str, revision: str | None) -> Path:
    if name == EMBEDDED:
        return EMBEDDED_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"--model {name}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # offline, gated, missing: the hub's own words say which
        raise UserError(
            f"--model {name}: neither a local folder nor to be had from the hub "
            f"({_one_line(error)[:200]}); for gated models set HF_TOKEN"
        ) from error


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture, family: Family) -> None:
    """Every row of the table must be in the files with its size, and nothing else."""
    expected = {name: spec.shape for name, (spec, _) in architecture.named_tensors().items()}
    missing = sorted(expected.keys() - checkpoint.tensors.keys())
    if missing:
        raise UserError(
            f"{checkpoint.folder}: config.json and weights disagree: {len(missing)} tensors are "
            f"missing, first {missing[0]}; restore the shard that held it"
        )
    known = {*expected, architecture.tied_head}
    extra = [n for n in checkpoint.tensors if n not in known and not n.endswith(family.ignored)]
    if extra:
        raise UserError(
            f"{checkpoint.folder}: {len(extra)} tensors that config.json does not account for, "
            f"first {sorted(extra)[0]}; config and weights are not of the same model"
        )
    for name, shape in expected.items():
        found = checkpoint.tensors[name]
        if found.shape != shape:
            raise UserError(
                f"{found.file}: {name} has shape {found.shape} where config.json says {shape}: "
                "config and weights are not of the same model"
            )


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the folder has none that `transformers` can read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.checkpoint.folder)
    except Exception as error:  # missing or damaged files surface as many types
        raise UserError(
            f"{source.checkpoint.folder}: no usable tokenizer ({_one_line(error)[:200]})"
        ) from error


def load_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    architecture: Architecture | None = None,
) -> PreTrainedModel:
    """Builds the model without storage and fills it tensor by tensor.

    Host memory peaks at the model in `dtype` plus one tensor. Under ZeRO-3 the model is born in
    slices, rank zero alone reads the files, and no rank holds more than a whole tensor.

    Args:
        source: checked checkpoint.
        dtype: of the parameters.
        device: they are placed on.
        architecture: the table after rotation, if that takes a tied head off the embedding.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    architecture = architecture or source.architecture
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = architecture.tied_head is not None
    with nullcontext() if is_deepspeed_zero3_enabled() else _no_storage(), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    damaged = ""
    for name in architecture.named_tensors():
        damaged = damaged or _fill(model, name, source, architecture, device)
    damaged = broadcast_object_list([damaged])[0]  # rank zero has read the files for all
    if damaged:
        raise UserError(damaged)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]  # the buffers; transformers types this wrongly
    return model.eval()


def _no_storage() -> AbstractContextManager[None]:
    return init_empty_weights(include_buffers=False)


def _fill(
    model: PreTrainedModel,
    name: str,
    source: Source,
    architecture: Architecture,
    device: torch.device,
) -> str:
    """Gives one parameter its values; returns what is wrong with them."""
    path, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    with gathered([parameter]):
        if not is_writer(parameter):
            return ""
        stored = stored_name(name, source.checkpoint, architecture)
        weight = source.checkpoint.read(stored)
        if not math.isfinite(weight.sum(dtype=torch.float64)):  # no copy of a large tensor
            return (
                f"{source.checkpoint.tensors[stored].file}: {stored} holds NaN or infinite values: "
                "the checkpoint is damaged"
            )
        if parameter.is_meta:
            filled = nn.Parameter(weight.to(device, parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(path), leaf, filled)
        else:
            with torch.no_grad():
                parameter.copy_(weight)
    return ""


def stored_name(name: str, checkpoint: Checkpoint, architecture: Architecture) -> str:
    """Where a tensor is read from: a head that was tied comes from the embedding."""
    if name in checkpoint.tensors:
        return name
    return next(spec.name for spec in architecture.tensors if spec.is_lookup)


def untie_head(model: PreTrainedModel) -> None:
    """Gives the output head storage of its own, as rotation folds the final norm into it."""
    head = model.get_output_embeddings()
    assert head is not None
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
