"""Labelled rows as people have them: missing, mixed, out of range, too few, too large a rate."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.commands.command import run_command
from llm_vtrans.prune import prune
from llm_vtrans.tasks import make_task
from llm_vtrans.tasks.finetuning import RECORD_FILE
from tests.faults.cases import told
from tests.faults.conftest import Tally
from tests.faults.guard import outcome
from tests.faults.mutations import counts, damaged_json, fuzz
from tests.integration import test_tasks
from tests.integration.test_tasks import rows, write

encoder = test_tasks.encoder  # fixture
Rows = list[dict[str, Any]]
COLUMNS = {"classification": "sentence", "regression": "sentence", "multiple-choice": "start,a,b"}


def finetune(folder: Path, encoder: Path, kind: str, *more: str) -> list[str]:
    return [
        *("--model", str(encoder), "--task", kind, "--data", str(folder / "train.jsonl")),
        *("--finetune-first", "true", "--finetune-epochs", "1", "--seq-len", "24", "--quiet"),
        *("--samples", "16", "--batch-size", "4", "--output", str(folder / "out"), *more),
        *(("--text-field", COLUMNS[kind]) if kind in COLUMNS else ()),
    ]


def put(name: str, value: object) -> Callable[[Rows], object]:
    return lambda rows: rows[3].update({name: value})


CASES: dict[str, tuple[str, Callable[[Rows], object], tuple[str, ...]]] = {
    "no text": ("classification", put("sentence", None), ("row 4", "'sentence'")),
    "no label": ("classification", lambda rows: rows[3].pop("label"), ("row 4", "'label'")),
    "labels of two kinds": (
        "classification", put("label", 1), ("--label-field label", "kinds"),
    ),
    "labels that are lists": (
        "classification", lambda rows: [row.update(label=[1]) for row in rows],
        ("--label-field label", "[1]"),
    ),
    "choice out of range": ("multiple-choice", put("label", 7), ("--label-field label", "7", "1")),
    "choice below zero": ("multiple-choice", put("label", -1), ("--label-field label", "-1")),
    "choice no number": (
        "multiple-choice", lambda rows: [row.update(label="x") for row in rows],
        ("--label-field label", "'x'"),
    ),
    "number is NaN": ("regression", put("label", float("nan")), ("--label-field label", "nan")),
    "answers no list": (
        "qa", lambda rows: [row.update(answers="x") for row in rows], ("row 1", "answers"),
    ),
    "answer without start": (
        "qa", lambda rows: [row["answers"].update(answer_start=[]) for row in rows],
        ("row 1", "answers"),
    ),
    "answer beyond its context": (
        "qa", lambda rows: rows[3]["answers"].update(answer_start=[9999]), ("row 4", "9999"),
    ),
    "answer before its context": (
        "qa", lambda rows: rows[3]["answers"].update(answer_start=[-5]), ("row 4", "-5"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str], tally: Tally, case: str
) -> None:
    kind, change, words = CASES[case]
    found = rows(kind, 12, 0)
    write(tmp_path, kind)
    change(found)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    line = told(capsys, prune, finetune(tmp_path, encoder, kind))
    assert [word for word in ("train.jsonl", *words) if word not in line] == [], line
    tally.survived("labelled rows", line)


@counts(15, 400)
@pytest.mark.parametrize("kind", [*COLUMNS, "qa"])
def test_damaged_rows(
    tmp_path: Path, encoder: Path, tally: Tally, kind: str, num_cases: int
) -> None:
    write(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    args = PruneArguments(
        model=str(encoder), data=str(tmp_path / "train.jsonl"), text_field=COLUMNS.get(kind)
    )

    def case(raw: bytes) -> None:
        lines = (json.dumps(row) for row in json.loads(raw))
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        tally.survived("labelled rows", outcome(lambda: make_task(args, kind, tokenizer, 24, 8)))

    fuzz(num_cases, damaged_json(rows(kind, 6, 0)), case)


@pytest.mark.timeout(60)
def test_fewer_rows_than_a_batch(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    write(tmp_path, "classification")
    line = told(capsys, prune, finetune(tmp_path, encoder, "classification", "--batch-size", "64",
                                        "--samples", "64"))  # fmt: skip
    assert "40" in line and "lower --batch-size" in line
    tally.survived("labelled rows", line)


def test_a_rate_that_overflows_is_named(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    """And leaves no dense model that a later run would take up."""
    write(tmp_path, "classification")
    more = ("--finetune-learning-rate", "1e30")
    line = told(capsys, prune, finetune(tmp_path, encoder, "classification", *more))
    assert "nan" in line and "lower --finetune-learning-rate" in line
    assert not (tmp_path / "out-dense").exists()
    tally.survived("learning rate", line)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_dense_model_is_not_taken_up(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    """A full disk leaves the earlier one, whole; and what has half a record is made anew."""
    write(tmp_path, "classification")
    arguments = finetune(tmp_path, encoder, "classification")
    assert run_command(prune, arguments) == 0
    capsys.readouterr()
    other = [*arguments, "--seed", "7", "--overwrite"]
    dense = tmp_path / "out-dense"
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    with largest_file(20_000):
        tally.survived("disk", told(capsys, prune, other))
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    assert not [*tmp_path.glob(".out-dense*")]
    record = dense / RECORD_FILE
    record.write_text('{"settings": {"seed"')  # half a record is none
    assert run_command(prune, [*arguments, "--overwrite"]) == 0
    assert json.loads(record.read_text())["settings"]["seed"] == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["pad", "cls"])
def test_a_tokenizer_without_what_the_task_needs(
    tmp_path: Path, encoder: Path, tally: Tally, missing: str
) -> None:
    write(tmp_path, "classification")
    whole = AutoTokenizer.from_pretrained(encoder)
    kept = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    del kept[f"{missing}_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole.backend_tokenizer, **kept)
    kind = "mlm" if missing == "cls" else "classification"
    args = PruneArguments(model="m", data=str(tmp_path / "train.jsonl"), text_field="sentence")
    line = outcome(lambda: make_task(args, kind, tokenizer, 8, 8))
    assert line is not None and "tokenizer" in line and missing in line, line
    tally.survived("tokenizers", line)
