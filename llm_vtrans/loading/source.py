"""LOAD: where a model comes from, checked by its config and shard headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError, blame
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.families import Architecture, Family, family_for
from llm_vtrans.families.base import head_of
from llm_vtrans.loading.checkpoint import Checkpoint

EMBEDDED = "embedded"
RESTORE = "restore the config.json that belongs to these weights"
COUNTED, MOST_COUNTED = ("layer", "label", "expert"), 100_000
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]


@dataclass(frozen=True)
class Source:
    """A dense checkpoint that was checked against its family's tensor table.

    Attributes:
        name: as the user gave it.
        checkpoint: its shards.
        config: parsed by `transformers`; it names a class, and says of a head whether it is tied.
        family: its adapter.
        architecture: its tensor table.
    """

    name: str
    checkpoint: Checkpoint
    config: Any
    family: Family
    architecture: Architecture

    @property
    def auto_class(self) -> Any:
        """The library's Auto class for the model's head."""
        return getattr(transformers, AUTO_CLASSES[head_of(self.config)])


def open_source(name: str, revision: str | None = None) -> Source:
    """Finds a model and checks config and shard headers; weights only of a tied head, if stored.

    Args:
        name: `embedded`, a local folder, or a hub id (the token comes from the environment).
        revision: of a hub model.

    Raises:
        UserError: not found, damaged, or of a family that is not supported.
    """
    checkpoint = Checkpoint.open(_local_folder(name, revision))
    family = family_for(str(checkpoint.config.get("model_type")))
    checkpoint = _canonical(checkpoint, family)
    _check_counts(checkpoint)
    with blame(checkpoint.folder / "config.json", RESTORE):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        if not config.architectures:
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        architecture = family.describe(config)
        if _is_apart(checkpoint, architecture):
            config.tie_word_embeddings = False
            architecture = family.describe(config)
    if min(architecture.num_layers, *architecture.num_units.values()) < 1:
        raise UserError(f"{checkpoint.folder / 'config.json'}: a model of no size; {RESTORE}")
    _check_tensors(checkpoint, architecture, family)
    return Source(name, checkpoint, config, family, architecture)


def _is_apart(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """Whether a head that should be tied is stored with other values than the embeddings.

    `transformers` then leaves the two apart, whatever the config says.
    """
    head, table = architecture.tied_head, architecture.embedding.name
    if head is None or not {head, table} <= checkpoint.tensors.keys():
        return False
    stored = (checkpoint.read(name, torch.device("cpu")) for name in (head, table))
    return not torch.equal(*stored)


def _canonical(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the tensor names of a model with a head."""
    names = family.canonical(checkpoint.tensors)
    lost = sorted(checkpoint.tensors.keys() - names.values())
    if lost:
        raise UserError(
            f"{checkpoint.folder}: {lost[0]} is there twice, under an old name and a new one; "
            "save the checkpoint again"
        )
    return checkpoint.renamed(names)


def _check_counts(checkpoint: Checkpoint) -> None:
    """Counts of layers and labels must be such that lists of them can be built.

    `transformers` builds those lists when it reads a config, before any tensor could show
    that a count of a billion is wrong.
    """
    for key, value in checkpoint.config.items():
        is_count = any(word in key for word in COUNTED)
        if is_count and isinstance(value, int | float) and not abs(value) <= MOST_COUNTED:
            raise UserError(
                f"{checkpoint.folder / 'config.json'}: {key} is beyond {MOST_COUNTED:,}; {RESTORE}"
            )


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
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # gated, missing: the hub's own words say which
        reason = "offline, not fetched before" if constants.HF_HUB_OFFLINE else _one_line(error)
        raise UserError(
            f"--model {name}: neither a local folder nor to be had from the hub "
            f"({reason[:200]}); for gated models set HF_TOKEN"
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
        if not found.dtype.is_floating_point:
            raise UserError(
                f"{found.file}: {name} has dtype {found.dtype}; only checkpoints of floating-point "
                "weights can be pruned, not quantised ones"
            )


def check_known(model: object, what: str, largest: int, number: int) -> None:
    """A tokenizer's ids must have rows in the model's table.

    Args:
        model: whose they are.
        what: kind of id, such as `token`.
        largest: that the tokenizer gives.
        number: of rows.

    Raises:
        UserError: there are fewer.
    """
    if largest >= number:
        raise UserError(
            f"{model}: the tokenizer gives {what} {largest}, the model knows {number}: they do not "
            "belong together"
        )


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the folder has none that `transformers` can read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # missing or damaged files surface as many types
        raise UserError(
            f"{source.checkpoint.folder}: no usable tokenizer ({_one_line(error)[:200]})"
        ) from error
