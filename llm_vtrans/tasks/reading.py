"""Labelled rows: GLUE by name from the hub, or any local jsonl, json, csv or parquet file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_vtrans.calibration.json_lines import SUFFIX, read_json_lines
from llm_vtrans.errors import UserError

Row = dict[str, Any]
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# GLUE task -> columns of its text, the metric it is known by, its validation split.
GLUE = {
    "cola": (("sentence",), "matthews", "validation"),
    "sst2": (("sentence",), "accuracy", "validation"),
    "mrpc": (("sentence1", "sentence2"), "f1", "validation"),
    "qqp": (("question1", "question2"), "f1", "validation"),
    "stsb": (("sentence1", "sentence2"), "spearman", "validation"),
    "mnli": (("premise", "hypothesis"), "accuracy", "validation_matched"),
    "qnli": (("question", "sentence"), "accuracy", "validation"),
    "rte": (("sentence1", "sentence2"), "accuracy", "validation"),
    "wnli": (("sentence1", "sentence2"), "accuracy", "validation"),
}


@dataclass(frozen=True)
class Labelled:
    """Where labelled examples come from.

    Attributes:
        data: GLUE task, hub dataset or file to train on.
        eval_data: file to evaluate on; by default the task's validation split, or the file
            `validation.*` beside a local one.
        text_fields: columns of the text, in the order in which they are joined.
        label_field: column of the label.
    """

    data: str
    eval_data: str | None
    text_fields: tuple[str, ...]
    label_field: str

    @property
    def glue_task(self) -> str | None:
        """The GLUE task that the data is, by its name or its folder's."""
        name = self.data.removeprefix("glue/")
        if Path(self.data).suffix in READERS:
            name = Path(self.data).expanduser().resolve().parent.name
        return name if name in GLUE else None

    def columns(self) -> tuple[str, ...]:
        """Columns of the text, given or known.

        Raises:
            UserError: neither.
        """
        if self.text_fields:
            return self.text_fields
        if self.glue_task is None:
            raise UserError(f"--data {self.data}: name its text columns with --text-field a,b")
        return GLUE[self.glue_task][0]


def read_split(source: Labelled, is_train: bool, columns: Sequence[str]) -> list[Row]:
    """All rows of one split.

    Args:
        source: where they are.
        is_train: to train on, else to evaluate on.
        columns: that each row must have.

    Raises:
        UserError: no such data, or a row without a column.
    """
    data = source.data if is_train else source.eval_data or _validation_of(source)
    rows = _read(data, source.glue_task, is_train)
    if not rows:
        raise UserError(f"{data}: holds no rows")
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise UserError(
            f"{data}: no column {missing[0]!r}; the columns are {', '.join(rows[0])}: name them "
            "with --text-field and --label-field"
        )
    for number, row in enumerate(rows, start=1):
        empty = next((name for name in columns if row.get(name) is None), None)
        if empty is not None:
            raise UserError(f"{data}: row {number} has no {empty!r}: fill it in or leave it out")
    return rows


def _validation_of(source: Labelled) -> str:
    path = Path(source.data).expanduser()
    if path.suffix not in READERS:
        return source.data
    for suffix in READERS:
        beside = path.with_name(f"validation{suffix}")
        if beside.is_file() and beside != path:
            return str(beside)
    raise UserError(f"--data {path}: has no validation file beside it; name one with --eval-data")


def _read(data: str, glue_task: str | None, is_train: bool) -> list[Row]:
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # our own line says it all
    datasets.disable_progress_bars()
    path = Path(data).expanduser()
    try:
        if path.suffix == SUFFIX:
            return list(read_json_lines(path))
        if path.suffix in READERS:
            rows = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        elif glue_task is not None:
            split = "train" if is_train else GLUE[glue_task][2]
            rows = datasets.load_dataset("nyu-mll/glue", glue_task, split=split)
        else:
            rows = datasets.load_dataset(data, split="train" if is_train else "validation")
    except UserError:
        raise
    except Exception as error:  # readers and the hub raise many types; all mean "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{data}: neither a readable {', '.join(READERS)} file nor a dataset of the hub "
            f"({reason}); GLUE tasks are {', '.join(GLUE)}"
        ) from error
    return list(rows)
