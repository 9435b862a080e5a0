"""VERIFY: does a published checkpoint hold what its manifest states?

Each check is a function of the checkpoint that yields one line per finding; none stops
the others, so that one call tells everything that is wrong.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import auto_class_of
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.record.manifest import score_of_stages
from llm_vtrans.record.output_folder import MANIFEST_FILE, what_to_name
from llm_vtrans.tasks import Task, make_task

CHUNK = 2**20  # bytes hashed at a time
BATCH_SIZE = 8  # sequences in a forward pass
TOLERANCE = 1e-3  # of a perplexity measured again in the same dtype on the same kind of device
LOOSE_TOLERANCE = 2e-2  # where dtype or device differ


@dataclass(frozen=True)
class Finding:
    """One line of the verification.

    Attributes:
        check: name of the check.
        is_failure: False for a check that passed or could not run.
        text: what was found.
        is_skipped: whether the check could not run.
    """

    check: str
    is_failure: bool
    text: str
    is_skipped: bool = False


@dataclass
class Subject:
    """The checkpoint that is verified; what is expensive is read once, when first used.

    Attributes:
        folder: the checkpoint.
        manifest: its `vtrans.json`.
        data: where the held-out text lies now; None takes the place that the manifest names.
    """

    folder: Path
    manifest: dict[str, Any]
    data: str | None = None

    @classmethod
    def open(cls, folder: Path, data: str | None = None) -> Subject:
        """Reads the manifest.

        Raises:
            UserError: there is none to verify against.
        """
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            manifest["sha256"], manifest["params"]["after"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: no usable {MANIFEST_FILE}; {what_to_name(folder)}"
            ) from error
        return cls(folder, manifest, data)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Config and shard headers."""
        return Checkpoint.open(self.folder)

    @cached_property
    def config(self) -> Any:
        """The config as `transformers` parses it; per-layer classes come with this package."""
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The loaded model in the dtype that the run computed in."""
        name = self.manifest["settings"].get("dtype", "auto")
        dtype = torch.float32 if name == "auto" else getattr(torch, name)
        model, info = auto_class(self.config).from_pretrained(
            self.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        wrong = {key: sorted(map(str, info[key])) for key in info if key.endswith("_keys")}
        wrong = {key: names for key, names in wrong.items() if names}
        if wrong:
            raise ValueError("; ".join(f"{key}: {names[0]}" for key, names in wrong.items()))
        return model.eval()


def auto_class(config: Any) -> Any:
    """The `transformers` auto class for the architecture that a config names."""
    name = auto_class_of((getattr(config, "architectures", None) or [""])[0])
    return getattr(transformers, name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_hashes(subject: Subject) -> Iterator[str]:
    """Every file that the manifest names is there with its bytes, and no other weights are."""
    for name, expected in subject.manifest["sha256"].items():
        path = subject.folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            yield f"{name} is missing"
        elif sha256_of(path) != expected:
            yield f"{name} has other bytes than were written"
    for path in sorted(subject.folder.glob("*.safetensors")):
        if path.name not in subject.manifest["sha256"]:
            yield f"{path.name} is not in the manifest"


def check_shapes(subject: Subject) -> Iterator[str]:
    """The config's model has exactly the stored tensors, with their shapes."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(subject.config).from_config(subject.config)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    stored = {name: info.shape for name, info in subject.checkpoint.tensors.items()}
    buffers = {name for name, _ in model.named_buffers()}
    for name in sorted(expected.keys() - stored.keys() - tied):
        yield f"{name} is missing"
    for name in sorted(stored.keys() - expected.keys() - tied - buffers):
        yield f"{name} is not part of the model that config.json describes"
    for name in sorted(stored.keys() & expected.keys()):
        if stored[name] != expected[name]:
            yield f"{name} has shape {stored[name]}, config.json says {expected[name]}"


def check_dtype(subject: Subject) -> Iterator[str]:
    """Floating-point tensors have the dtype that config.json names; some may have another."""
    stated = subject.checkpoint.config.get("dtype", subject.checkpoint.config.get("torch_dtype"))
    found = {i.dtype for i in subject.checkpoint.tensors.values() if i.dtype.is_floating_point}
    names = {str(dtype).removeprefix("torch.") for dtype in found}
    if stated is not None and stated not in names:
        yield f"tensors are {', '.join(sorted(names))}, config.json says {stated}"


def check_parameters(subject: Subject) -> Iterator[str]:
    """The stored parameters are as many as the manifest states, and within the budget."""
    stated = subject.manifest["params"]["after"]
    stored = sum(torch.Size(i.shape).numel() for i in subject.checkpoint.tensors.values())
    if stored != stated:
        yield f"{stored:,} parameters are stored, the manifest states {stated:,}"
    yield from _beyond_budget(subject, "params", stored)


def check_macs(subject: Subject) -> Iterator[str]:
    """PyTorch's own counter finds the multiply-accumulates that the manifest states.

    On a network without weights; attention is eager, as the counter knows no fused kernel.
    """
    config = copy.deepcopy(subject.config)
    if (rope := getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        config.rope_parameters = {**rope, "rope_type": "default"}  # which reads no positions
    stated, seq_len = subject.manifest["macs"]["after"], subject.manifest["macs"]["seq_len"]
    tokens = torch.ones(1, seq_len, dtype=torch.long, device="meta")
    with init_empty_weights(), torch.device("meta"):
        model = auto_class(subject.config).from_config(config, attn_implementation="eager")
    model.config.pad_token_id = None  # tokens without values cannot be searched for it
    if subject.manifest.get("task") == "multiple-choice":
        tokens = tokens[:, None]
    with FlopCounterMode(display=False) as counter:
        model.eval()(tokens)
    if counter.get_total_flops() != 2 * stated:
        yield f"{counter.get_total_flops() // 2:,} are counted, the manifest states {stated:,}"
    yield from _beyond_budget(subject, "MACs", stated)


def _beyond_budget(subject: Subject, kind: str, count: int) -> Iterator[str]:
    """A finding for every budget of a kind that a count is above."""
    for budget in (subject.manifest["budget"], *subject.manifest.get("also", ())):
        if budget["kind"] == kind and count > budget["target"]:
            yield f"{count:,} {kind} exceed the budget of {budget['target']:,}"


def check_loads(subject: Subject) -> Iterator[str]:
    """It loads in `transformers`, with finite weights, and its tokenizer with it."""
    for name, parameter in subject.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            yield f"{name} holds NaN or infinite values"
    tokenizer = AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=False)
    # Tokens that were added, such as one for padding, often lack a row in the dense model, too.
    known, size = tokenizer.vocab_size, subject.config.vocab_size
    if known > size:
        yield f"{known} tokens in the tokenizer, {size} in the model"


def check_perplexity(subject: Subject) -> Iterator[str]:
    """Perplexity, or a task's scores, on the run's held-out data are what the manifest states.

    Raises:
        Skipped: the text is not to be had here, or the run measured something else.
    """
    manifest = subject.manifest
    entry = score_of_stages(manifest)
    stated = entry.get("pruned")
    if stated is None:
        raise Skipped("the manifest states none")
    task = _task(subject)
    digest = entry.get("windows_sha256")
    if digest is not None and digest != windows_sha256(task.heldout.tensors["input_ids"]):
        raise Skipped("the text found here is not the one that the run held out; see --data")
    found = task.evaluate(subject.model, BATCH_SIZE)
    scores = manifest.get("scores", {}).get("pruned", {})
    claims = [(task.headline, stated), *((name, scores[name]) for name in sorted(scores))]
    computed = manifest.get("computed_in", {"device": "cpu", "dtype": "float32"})
    dtype = str(subject.model.dtype).removeprefix("torch.")
    is_same = computed == {"device": "cpu", "dtype": dtype}
    tolerance = TOLERANCE if is_same else LOOSE_TOLERANCE
    for name, value in dict.fromkeys(claims):  # the headline stands in both places
        if not abs(found[name] - value) <= tolerance * abs(value):
            figures = f"{found[name]:.4f} measured, {value:.4f} stated"
            yield f"{name}: {figures} (tolerance {100 * tolerance:g}%)"


class Skipped(Exception):
    """A check that cannot run here; the text says why."""


def _task(subject: Subject) -> Task:
    """The run's task with its held-out examples, made anew from its data."""
    settings = subject.manifest["settings"]
    known = {f.name: settings[f.name] for f in fields(PruneArguments) if f.name in settings}
    args = PruneArguments(**{**known, "data": subject.data or settings["data"]})
    kind, seq_len = subject.manifest.get("task", "clm"), subject.manifest["macs"]["seq_len"]
    tokenizer = AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=False)
    own: Any = subject.model.config.id2label
    try:
        return make_task(args, kind, tokenizer, seq_len, args.samples, own_classes=own)
    except UserError as error:
        raise Skipped(f"the data is not here ({error})") from error


def windows_sha256(windows: torch.Tensor) -> str:
    """Identity of token windows `(num_windows, seq_len)` int64, in hexadecimal."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


CHECKS: dict[str, Callable[[Subject], Iterator[str]]] = {
    "hashes": check_hashes,
    "shapes": check_shapes,
    "dtype": check_dtype,
    "parameters": check_parameters,
    "macs": check_macs,
    "loads": check_loads,
    "perplexity": check_perplexity,
}


def verify(subject: Subject, names: tuple[str, ...] = tuple(CHECKS)) -> Iterator[Finding]:
    """Runs checks; a check that raises has failed, for what it reads is the checkpoint's fault.

    Args:
        subject: what to verify.
        names: of the checks, in order.
    """
    for name in names:
        try:
            failures = list(CHECKS[name](subject))
        except Skipped as reason:
            yield Finding(name, False, f"skipped: {reason}", is_skipped=True)
            continue
        except Exception as error:  # loading a damaged checkpoint raises many types
            failures = [" ".join(str(error).split())[:300] or type(error).__name__]
        if not failures:
            yield Finding(name, False, "holds")
        for text in failures:
            yield Finding(name, True, text)
