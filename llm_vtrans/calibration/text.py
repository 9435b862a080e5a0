"""CALIBRATE: text -> packed token windows, and a held-out part that is never trained on."""

from __future__ import annotations

import codecs
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_vtrans.arguments import share_of
from llm_vtrans.calibration.json_lines import SUFFIX, read_json_lines
from llm_vtrans.embedded.corpus import heldout_documents, training_documents
from llm_vtrans.errors import UserError

EMBEDDED = "embedded"
# name -> (hub dataset, config, split, text field)
NAMED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence"),
}
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
CHARACTERS_PER_TOKEN = 8  # generous: text is read until there is surely enough of it
LONGEST_DOCUMENT = 2**20  # characters; what is longer comes in pieces: memory is bounded
HELDOUT_SHARE = 16  # one window in so many is set apart for evaluation


@dataclass(frozen=True)
class TextSource:
    """Where calibration text comes from.

    Attributes:
        data: `embedded`, a known name, a hub dataset id, or a local file or folder.
        config: hub dataset configuration.
        split: hub dataset split.
        text_field: column that holds the text.
    """

    data: str
    config: str | None = None
    split: str | None = None
    text_field: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Token windows: `train (num_samples, seq_len)` and `heldout (num_heldout, seq_len)`, int64."""

    train: Tensor
    heldout: Tensor


def calibrate(
    source: TextSource, tokenizer: Any, num_samples: int, seq_len: int, seed: int,
    fraction: float = 1.0,
) -> Calibration:  # fmt: skip
    """Packs text into windows without padding.

    Neighbouring documents stay together in passages of a few windows; passages, and then
    windows, are shuffled by the seed. The embedded text brings held-out documents of its own; from
    any other source a share of the passages is set apart first.

    Args:
        source: where the text comes from.
        tokenizer: of the model.
        num_samples: windows to train on.
        seq_len: tokens in a window.
        seed: of the shuffle.
        fraction: share of these windows that is kept to train on; which, the seed decides. What
            is held out stays the same.

    Raises:
        UserError: no such data or field, or too few tokens.
    """
    num_heldout = max(1, min(64, num_samples // HELDOUT_SHARE))
    passages = _passages(documents(source), seq_len, num_samples + num_heldout)
    if len(passages) == 1:  # one giant line: its parts stand in for documents
        size = -(-len(passages[0]) // (2 * HELDOUT_SHARE))
        passages = [passages[0][i : i + size] for i in range(0, len(passages[0]), size)]
    random.Random(seed).shuffle(passages)
    train_passages, heldout_passages = passages, list(heldout_documents())
    if source.data != EMBEDDED:
        share = max(1, len(passages) // HELDOUT_SHARE)
        heldout_passages, train_passages = passages[:share], passages[share:]
    num_samples = share_of(num_samples, fraction)
    train = _pack(train_passages, tokenizer, num_samples, seq_len)
    heldout = _pack(heldout_passages, tokenizer, num_heldout, seq_len)
    if len(train) < num_samples and source.data == EMBEDDED and len(train):
        train = train.repeat(-(-num_samples // len(train)), 1)[:num_samples]
    if len(train) < num_samples or not len(heldout):
        raise UserError(
            f"--data {source.data} holds {len(train) * seq_len:,} tokens for training and "
            f"{len(heldout) * seq_len:,} held out, but --samples {num_samples} x --seq-len "
            f"{seq_len} needs {num_samples * seq_len:,}: lower --samples or bring more text"
        )
    # Neighbours of one passage tell nearly the same: spread over steps, gradients are less noisy.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Calibration(train[order], heldout)


def documents(source: TextSource) -> Iterator[str]:
    """Yields documents of a source: paragraphs of a .txt file, rows of anything else.

    Raises:
        UserError: the source does not exist, cannot be read, or lacks the text field.
    """
    if source.data == EMBEDDED:
        return iter(training_documents())
    path = Path(source.data).expanduser()
    if path.exists():
        return chain.from_iterable(_read_file(file, source) for file in _files(path))
    if path.suffix in READERS or source.data.startswith((".", "/", "~")):
        raise UserError(f"--data {source.data}: no such file or folder")
    return _read_hub(source)


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in READERS)
    if not files or any(file.suffix not in READERS for file in files):
        raise UserError(f"--data {path}: expected {', '.join(READERS)} files, or a folder of them")
    return files


def _read_file(file: Path, source: TextSource) -> Iterator[str]:
    if file.suffix == ".txt":
        return _read_paragraphs(file)
    if file.suffix == SUFFIX:
        return _texts(read_json_lines(file), source.text_field or "text", str(file))
    return _read_rows(file, source.text_field or "text")


def _read_rows(file: Path, field: str) -> Iterator[str]:
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # the line below says it all
    try:
        rows = datasets.load_dataset(
            READERS[file.suffix], data_files=str(file), split="train", streaming=True
        )
        yield from _texts(rows, field, str(file))
    except UserError:
        raise
    except Exception as error:  # the readers raise many types; all are the file's fault
        raise UserError(
            f"--data {file}: cannot be read as {file.suffix} ({error}): repair or convert it"
        ) from error


def _read_paragraphs(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as text:
            block: list[str] = []
            size = 0
            for line in iter(lambda: text.readline(LONGEST_DOCUMENT), ""):
                if "\0" in line:
                    raise UserError(f"--data {file}: holds zero bytes, so it is not text")
                is_blank = not line.strip()
                if not is_blank:
                    block.append(line)
                    size += len(line)
                if block and (is_blank or size >= LONGEST_DOCUMENT):
                    yield "".join(block)
                    block, size = [], 0
            if block:
                yield "".join(block)
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {file}: not UTF-8 text (byte {_first_bad_byte(file)}): convert it first"
        ) from error


def _first_bad_byte(file: Path) -> int:
    """Where a file stops being UTF-8, counted from its beginning."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with file.open("rb") as data:
        while chunk := data.read(2**20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            position += len(chunk)
    return position - len(decoder.getstate()[0])


def _read_hub(source: TextSource) -> Iterator[str]:
    from datasets import load_dataset

    name, config, split, field = NAMED.get(source.data, (source.data, None, "train", "text"))
    try:
        rows = load_dataset(
            name, source.config or config, split=source.split or split, streaming=True
        )
    except Exception as error:  # the hub client raises many types; all mean "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--data {source.data}: neither a local file nor a dataset that could be loaded from "
            f"the hub ({reason}); known names are {EMBEDDED}, {', '.join(NAMED)}"
        ) from error
    return _texts(rows, source.text_field or field, source.data)


def _texts(rows: Iterable[dict[str, Any]], field: str, name: str) -> Iterator[str]:
    for row in rows:
        if field not in row:
            raise UserError(
                f"--data {name}: no text field {field!r}; the fields are {', '.join(row)}: "
                "name one with --text-field"
            )
        text = row[field]
        if isinstance(text, str) and text.strip():
            for start in range(0, len(text), LONGEST_DOCUMENT):
                yield text[start : start + LONGEST_DOCUMENT]


def _passages(texts: Iterator[str], seq_len: int, num_windows: int) -> list[str]:
    """Joins neighbouring documents into passages of about four windows each."""
    passage_size = 4 * seq_len * CHARACTERS_PER_TOKEN // 2
    enough = 4 * num_windows * seq_len * CHARACTERS_PER_TOKEN
    passages: list[str] = []
    part: list[str] = []
    size = total = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= passage_size:
            passages.append("\n\n".join(part))
            total += size
            part, size = [], 0
        if total >= enough:
            break
    if part:
        passages.append("\n\n".join(part))
    return passages


def _pack(passages: list[str], tokenizer: Any, num_windows: int, seq_len: int) -> Tensor:
    """Tokenises passages until `num_windows` windows are full; `(<= num_windows, seq_len)`."""
    tokens: list[int] = []
    for passage in passages:
        tokens += tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= num_windows * seq_len:
            break
    count = min(num_windows, len(tokens) // seq_len)
    return torch.tensor(tokens[: count * seq_len], dtype=torch.long).view(count, seq_len)
