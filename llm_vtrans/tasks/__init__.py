"""Tasks: what a run trains on, how its models are scored, and which head they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llm_vtrans.arguments import PruneArguments, share_of
from llm_vtrans.calibration.text import TextSource, calibrate
from llm_vtrans.errors import UserError, blame
from llm_vtrans.masking.attachment import logits_of
from llm_vtrans.scoring.perplexity import token_perplexity
from llm_vtrans.tasks import encoding, metrics
from llm_vtrans.tasks.encoding import Examples, inputs_of
from llm_vtrans.tasks.reading import GLUE, Labelled, read_split

# Task -> ending of the model class that it needs.
HEADS = {
    "clm": "ForCausalLM",
    "mlm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "multiple-choice": "ForMultipleChoice",
    "qa": "ForQuestionAnswering",
}
SPAN_COLUMNS = ("question", "context", "answers")


@dataclass(frozen=True)
class Task:
    """A task with its examples.

    Attributes:
        kind: key of `HEADS`.
        train: examples in the order of training.
        heldout: examples that are scored and never trained on.
        headline: the score that a summary shows.
        protocol: how it is measured, in words.
        classes: names by number; none where the task has none.
    """

    kind: str
    train: Examples
    heldout: Examples
    headline: str
    protocol: str
    classes: tuple[str, ...] = ()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch_size: int) -> dict[str, float]:
        """All scores of a model on the held-out examples."""
        if self.kind == "clm":
            windows = self.heldout.tensors["input_ids"]
            return {"perplexity": token_perplexity(model, windows, batch_size).value}
        device = next(model.parameters()).device
        is_training = model.training
        model.eval()
        logits: list[Tensor] = []
        totals = {"nll": 0.0, "num": 0.0}
        for batch in self.heldout.batches(batch_size, device):
            found = logits_of(model(**inputs_of(batch)))
            if self.kind == "mlm":  # logits of a whole vocabulary are not kept
                part = metrics.token_nll(found, batch["labels"])
                totals = {name: totals[name] + part[name] for name in totals}
                continue
            space = self.heldout.seq_len - found.shape[-1] if self.kind == "qa" else 0
            logits.append(nn.functional.pad(found.float(), (0, space), value=-1e9).cpu())
        model.train(is_training)
        if self.kind == "mlm":
            return {"pseudo_perplexity": _exp(totals["nll"] / totals["num"])}
        return self._scores(torch.cat(logits))

    def _scores(self, logits: Tensor) -> dict[str, float]:
        tensors = self.heldout.tensors
        if self.kind == "qa":
            return metrics.spans(logits, tensors["start_positions"], tensors["end_positions"])
        if self.kind == "regression":
            return metrics.regression(logits, tensors["labels"])
        if self.kind == "multiple-choice":
            return {"accuracy": metrics.accuracy(logits, tensors["labels"])}
        return metrics.classification(logits, tensors["labels"])


def task_of(args: PruneArguments, head: str, num_labels: int) -> str:
    """The task of a run: the one asked for, or the one that the checkpoint's head is for.

    Raises:
        UserError: the head does not fit the task.
    """
    head = "ForCausalLM" if head == "LMHeadModel" else head
    fitting = [kind for kind, needed in HEADS.items() if needed == head]
    if fitting == ["classification", "regression"]:
        fitting = ["regression"] if num_labels == 1 else ["classification"]
    if args.task is None or args.task in fitting:
        return fitting[0]
    raise UserError(
        f"--task {args.task}: {args.model} has a head for {fitting[0]}; --finetune-first makes "
        "a model for the task from it"
    )


def shown(data: str) -> str:
    """Data by a name that may be published: of a local path the last two parts."""
    path = Path(data).expanduser()
    return "/".join(path.parts[-2:]) if path.exists() else data


def _exp(nll: float) -> float:
    """Perplexity of a mean loss in nats; infinite where no float is large enough."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def make_task(
    args: PruneArguments, kind: str, tokenizer: Any, seq_len: int, num_samples: int | None,
    fraction: float = 1.0, own_classes: Mapping[int, str] = MappingProxyType({}),
) -> Task:  # fmt: skip
    """Reads and encodes a task's data.

    Args:
        args: name the data.
        kind: the task.
        tokenizer: of the model.
        seq_len: tokens in a sequence at most.
        num_samples: examples to train on; labelled data is repeated or cut to them, and None
            takes it as it is.
        fraction: share of the data that is used, and of `num_samples` that is left.
        own_classes: names of a trained head's classes by number.

    Raises:
        UserError: data that cannot be read or does not fit the task.
    """
    assert args.data is not None
    if kind in ("clm", "mlm"):
        num = num_samples or args.samples
        return _text_task(args, kind, tokenizer, seq_len, num, fraction)
    fields = tuple(name.strip() for name in (args.text_field or "").split(",") if name.strip())
    source = Labelled(args.data, args.eval_data, fields, args.label_field)
    columns = SPAN_COLUMNS if kind == "qa" else source.columns()
    needed = columns if kind == "qa" else (*columns, source.label_field)
    rows = {split: read_split(source, split, needed) for split in (True, False)}
    classes = encoding.Classes((), {})

    def encode(is_train: bool) -> Examples:
        if kind == "qa":
            return encoding.spans(rows[is_train], tokenizer, seq_len)
        given = (rows[is_train], columns, source.label_field, tokenizer, seq_len)
        if kind == "classification":
            return encoding.classification(*given, classes)
        return (encoding.regression if kind == "regression" else encoding.multiple_choice)(*given)

    name = args.data
    try:
        with blame("rows", f"bring them into the form that --task {kind} takes"):
            if kind == "classification":
                classes = encoding.classes_of(rows[True], source.label_field, own_classes)
            train = encode(True)
            name = args.eval_data or f"{name}, its validation part"
            heldout = encode(False)
    except UserError as error:
        raise UserError(f"--data {name}: {error}") from error
    known = GLUE[source.glue_task][1] if source.glue_task else "accuracy"
    if known not in metrics.TWO_CLASSES or len(own_classes or classes.names) != 2:
        known = "accuracy"
    headline = {"classification": known, "regression": "spearman", "qa": "f1"}.get(kind, "accuracy")
    return Task(
        kind,
        train.take(training_order(len(train), num_samples, fraction, args.seed)),
        heldout,
        headline,
        f"{headline} over all {len(heldout)} validation examples of {shown(args.data)}",
        classes.names,
    )


def training_order(num: int, num_samples: int | None, fraction: float, seed: int) -> Tensor:
    """Rows to train on: one shuffle after the other.

    Args:
        num: rows there are.
        num_samples: rows to train on, repeated ones counted; None for each once.
        fraction: share of the rows that is used, and of `num_samples` that is left, so that
            every row used comes as often; which rows, the seed decides.
        seed: of subset and shuffles.

    Returns:
        Indices, `(share_of(num_samples, fraction),)`.
    """
    draw = torch.Generator().manual_seed(seed)
    used = torch.arange(num)
    if fraction < 1:
        used = torch.randperm(num, generator=draw)[: share_of(num, fraction)]
    total = len(used) if num_samples is None else share_of(num_samples, fraction)
    epochs = range(-(-total // len(used)))
    return torch.cat([used[torch.randperm(len(used), generator=draw)] for _ in epochs])[:total]


def _text_task(
    args: PruneArguments, kind: str, tokenizer: Any, seq_len: int, num_samples: int,
    fraction: float,
) -> Task:  # fmt: skip
    text = TextSource(args.data or "", args.data_config, args.data_split, args.text_field)
    width = seq_len - 2 if kind == "mlm" else seq_len
    data = calibrate(text, tokenizer, num_samples, width, args.seed, fraction)
    windows = (
        f"{len(data.heldout)} non-overlapping windows of {seq_len} tokens held out from "
        f"{shown(text.data)}"
    )
    if kind == "clm":
        protocol = f"token-level over {windows}"
        train, heldout = (Examples({"input_ids": t}) for t in (data.train, data.heldout))
        return Task(kind, train, heldout, "perplexity", protocol)
    for name in ("mask", "cls", "sep"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(f"{args.model}: its tokenizer has no {name} token, so no masked LM")
    return Task(
        kind,
        encoding.masked_windows(data.train, tokenizer, args.seed, corrupt=True),
        encoding.masked_windows(data.heldout, tokenizer, 0, corrupt=False),
        "pseudo_perplexity",
        f"exp of the mean loss of masked tokens, 15% of {windows}, drawn once and masked at once",
    )
