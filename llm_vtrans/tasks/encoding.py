"""Rows -> tensors of one length, for every kind of head."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.errors import UserError
from llm_vtrans.tasks.reading import Row

LABELS = ("labels", "start_positions", "end_positions")
UNNAMED = re.compile(r"LABEL_\d+")  # as transformers calls a class without a name
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Tensors by the names that a model's `forward` takes, each with `num` rows.

    Sequences are padded on the right to one length, `(num, seq)`; those of multiple choice
    have a dimension more, `(num, choices, seq)`.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    @property
    def seq_len(self) -> int:
        """Tokens in the longest sequence."""
        return int(self.tensors["input_ids"].shape[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens that the model sees of one example, padding included."""
        return self.tensors["input_ids"][0].numel()

    def take(self, indices: Tensor) -> Examples:
        """These rows, in this order."""
        return Examples({name: tensor[indices] for name, tensor in self.tensors.items()})

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order, each batch as short as its longest sequence."""
        for start in range(0, len(self), batch_size):
            batch = {n: t[start : start + batch_size] for n, t in self.tensors.items()}
            yield {name: tensor.to(device) for name, tensor in shortened(batch).items()}


def with_noise(examples: Examples, share: float, tokens: Tensor, seed: int) -> Examples:
    """Examples in which random tokens stand in the place of some.

    Calibration text never shows what the model knows about other texts, so masks would let
    it go. Next to random tokens a network answers with much of what it knows: queries of
    random words suffice to extract a model (Krishna et al., arXiv:1910.12366, section 4).

    Args:
        examples: without labels, as only a teacher knows what follows such a text.
        share: of the tokens that are replaced, in [0, 1).
        tokens: those to draw from, `(num_tokens,)`; only these are replaced.
        seed: of positions and tokens.
    """
    assert not examples.tensors.keys() & set(LABELS)
    draw = torch.Generator().manual_seed(seed)
    ids = examples.tensors["input_ids"]
    others = tokens[torch.randint(len(tokens), ids.shape, generator=draw)]
    is_replaced = (torch.rand(ids.shape, generator=draw) < share) & torch.isin(ids, tokens)
    return Examples({**examples.tensors, "input_ids": torch.where(is_replaced, others, ids)})


def collate(rows: Sequence[Batch]) -> Batch:
    """A batch of examples, cut to its longest sequence."""
    return shortened({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def shortened(batch: Batch) -> Batch:
    """Drops the columns in which every sequence of the batch is padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    used = mask.flatten(0, -2).any(0)
    longest = int(used.sum())
    assert bool(used[:longest].all())  # padding is on the right
    whole = mask.shape[-1]
    return {
        name: tensor[..., :longest] if tensor.shape[-1:] == (whole,) else tensor
        for name, tensor in batch.items()
    }


def inputs_of(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart.

    Attributes:
        names: by number.
        numbers: of labels as the data has them.
    """

    names: tuple[str, ...]
    numbers: Mapping[Any, int]


def classes_of(rows: Sequence[Row], label: str, own: Mapping[int, str]) -> Classes:
    """The number of every label: what it is to a trained head, or its place in their order.

    Args:
        rows: of the training data.
        label: the column.
        own: names of a trained head's classes by number (`config.id2label`); labels are such
            names or numbers. A head that has no names of its own takes others in their order.

    Raises:
        UserError: labels that cannot be told apart or put in order, or that the head does not
            know.
    """
    try:
        found = sorted({row[label] for row in rows})
    except TypeError as error:
        some = list({type(row[label]).__name__: row[label] for row in rows}.values())
        raise UserError(
            f"--label-field {label} holds labels of several kinds, or no labels, among them "
            f"{', '.join(map(repr, some))}: make all of them text, or all numbers"
        ) from error
    names = tuple(str(name) for _, name in sorted(own.items()))
    known = _known(names)
    if all(each in known for each in found):
        return Classes(names, known)
    if not all(map(UNNAMED.fullmatch, names)):
        other = next(each for each in found if each not in known)
        raise UserError(
            f"--label-field {label} holds {other!r}, the model's classes are {', '.join(names)}: "
            "name labels as it does or number them from 0; --finetune-first makes a model for them"
        )
    return Classes(tuple(map(str, found)), {each: i for i, each in enumerate(found)})


def _known(names: Sequence[str]) -> dict[Any, int]:
    """Numbers by name and as they are, unless numbers are names."""
    known: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if any(name.isdecimal() for name in names):
        return known | {int(name): i for i, name in enumerate(names) if name.isdecimal()}
    return known | {form: i for i in range(len(names)) for form in (i, str(i))}


def classification(
    rows: Sequence[Row], columns: Sequence[str], label: str, tokenizer: Any, seq_len: int,
    classes: Classes,
) -> Examples:  # fmt: skip
    """Texts or pairs with a class each."""
    numbers = classes.numbers
    unknown = next((row[label] for row in rows if row[label] not in numbers), None)
    if unknown is not None:
        known = ", ".join(classes.names)
        raise UserError(f"label {unknown!r} is not among those of the training data: {known}")
    labels = torch.tensor([numbers[row[label]] for row in rows])
    return Examples({**_texts(rows, columns, tokenizer, seq_len), "labels": labels})


def regression(
    rows: Sequence[Row], columns: Sequence[str], label: str, tokenizer: Any, seq_len: int
) -> Examples:
    """Texts or pairs with a number each."""
    labels = torch.tensor([_number(row[label], label) for row in rows])
    return Examples({**_texts(rows, columns, tokenizer, seq_len), "labels": labels})


def _number(value: Any, label: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--label-field {label}: not a number ({error})") from error
    if not math.isfinite(number):
        raise UserError(f"--label-field {label}: {number} is no finite number; leave its row out")
    return number


def multiple_choice(
    rows: Sequence[Row], columns: Sequence[str], label: str, tokenizer: Any, seq_len: int
) -> Examples:
    """A context with choices: one column each, or one column that lists them."""
    context, *names = columns
    found = [list(row[names[0]]) if len(names) == 1 else [row[n] for n in names] for row in rows]
    num = len(found[0])
    if num < 2 or any(len(choices) != num for choices in found):
        raise UserError(f"--text-field {','.join(columns)}: every row needs the same choices, >= 2")
    flat = [
        {"context": row[context], "choice": choice}
        for row, choices in zip(rows, found, strict=True)
        for choice in choices
    ]
    texts = _texts(flat, ("context", "choice"), tokenizer, seq_len)
    given = [row[label] for row in rows]
    wrong = next((x for x in given if str(x) not in map(str, range(num))), None)
    if wrong is not None:
        raise UserError(f"--label-field {label}: {wrong!r} is no choice out of 0 to {num - 1}")
    labels = torch.tensor([int(x) for x in given])
    return Examples({**{n: t.unflatten(0, (-1, num)) for n, t in texts.items()}, "labels": labels})


def spans(rows: Sequence[Row], tokenizer: Any, seq_len: int) -> Examples:
    """SQuAD's columns: question, context, answers with text and answer_start.

    The first answer's tokens are the label; an answer beyond `seq_len` is the first token.
    """
    kept = _texts(rows, ("question", "context"), tokenizer, seq_len, truncation="only_second")
    ends = []
    for i, row in enumerate(rows):
        answer = _first_answer(row, i + 1)
        tokens = (0, 0)
        if answer is not None:
            encoding = tokenizer(
                row["question"], row["context"], truncation="only_second", max_length=seq_len
            )
            pair = tuple(encoding.char_to_token(0, place, 1) for place in answer)
            tokens = pair if None not in pair else tokens
        assert bool(kept["attention_mask"][i, tokens[1]])
        ends.append(tokens)
    first, last_ = torch.tensor(ends).T
    return Examples({**kept, "start_positions": first, "end_positions": last_})


def _first_answer(row: Row, number: int) -> tuple[int, int] | None:
    """First and last character in the context, or None if the question has no answer."""
    try:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if not texts:
            return None
        start, length = int(starts[0]), len(texts[0])
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"row {number}: answers is no object with lists text and answer_start, as SQuAD has it"
        ) from error
    if not 0 <= start < start + length <= len(row["context"]):
        raise UserError(
            f"row {number}: the answer of {length} characters at {start} does not lie in its "
            f"context of {len(row['context'])}"
        )
    return start, start + length - 1


def masked_windows(
    windows: Tensor, tokenizer: Any, seed: int, corrupt: bool, share: float = 0.15
) -> Examples:
    """Windows between the special tokens with a share of their tokens to be predicted.

    Args:
        windows: plain tokens, `(num, seq - 2)`.
        tokenizer: knows the special tokens.
        seed: of the draw, which is made once.
        corrupt: BERT's corruption (80% mask, 10% a random token, 10% as it is), to train on;
            else all of them are masked, to be scored.
        share: of the tokens, in [0, 1).
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(windows.shape, generator=draw) < share
    chosen[~chosen.any(1), 0] = True
    fate = torch.rand(windows.shape, generator=draw) if corrupt else torch.zeros(windows.shape)
    other = torch.randint(len(tokenizer), windows.shape, generator=draw)
    mask = torch.full_like(windows, tokenizer.mask_token_id)
    seen = torch.where(chosen & (fate < 0.8), mask, windows)
    seen = torch.where(chosen & (fate >= 0.9), other, seen)
    labels = torch.where(chosen, windows, -100)
    pad = torch.nn.functional.pad
    seen, labels = pad(seen, (1, 1)), pad(labels, (1, 1), value=-100)
    seen[:, 0], seen[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return Examples({"input_ids": seen, "labels": labels})


def _texts(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Any, seq_len: int,
    truncation: bool | str = True,
) -> Batch:  # fmt: skip
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{tokenizer.name_or_path or 'model'}: the tokenizer has neither a pad nor an eos "
            "token; name one as pad_token in tokenizer_config.json"
        )
    read: Callable[[str], list[str]] = lambda name: [str(row[name]) for row in rows]  # noqa: E731
    encoded = tokenizer(
        *(read(name) for name in columns), truncation=truncation, max_length=seq_len,
        padding="longest", padding_side="right", return_tensors="pt",
    )  # fmt: skip
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
