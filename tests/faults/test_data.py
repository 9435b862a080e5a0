"""Calibration text as people have it: one line, other encodings, no text, special tokens."""

import json
import os
from pathlib import Path

import pytest

from llm_vtrans.calibration.text import LONGEST_DOCUMENT, TextSource, documents
from llm_vtrans.prune import prune
from tests.faults.cases import one_line, process, told
from tests.faults.conftest import Tally
from tests.faults.guard import confined, outcome
from tests.runs import flags

LETTERS = "abcdefgh ABCDEFGH"
MANY = 10_000_000  # documents
MOST_GIB = 2.0  # of resident memory, with torch, for all of them


def test_a_giant_line_comes_in_pieces(tmp_path: Path, tally: Tally) -> None:
    text = LETTERS * (3 * LONGEST_DOCUMENT // len(LETTERS))
    (tmp_path / "line.txt").write_text(text)
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for name in ("line.txt", "line.jsonl"):
        pieces = list(documents(TextSource(str(tmp_path / name))))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= LONGEST_DOCUMENT
        tally.survived("data")


def test_paragraphs_are_what_blank_lines_separate(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\na\nb\n \nc\n\n\nd")
    assert list(documents(TextSource(str(tmp_path / "a.txt")))) == ["a\nb\n", "c\n", "d"]


def test_the_byte_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text\n" * 5000 + b"caf\xe9 \n")
    line = outcome(lambda: list(documents(TextSource(str(tmp_path / "a.txt")))))
    assert line is not None and "(byte 50003)" in line


CASES = {
    "empty.txt": b"",
    "zeros.txt": bytes(5000),
    "binary.txt": bytes(range(256)) * 50,
    "mixed.txt": "ä ö ü ".encode() * 200 + "ä ö ü ".encode("latin-1") * 200,
    "utf16.txt": (LETTERS * 500).encode("utf-16"),
    "no-text.jsonl": b'{"text": null}\n{"text": 3}\n{"text": ["a"]}\n',
    "some-fields.jsonl": b'{"body": "a"}\n{"text": "b"}\n',
    "special.txt": b"<|endoftext|>" * 3,
    "binary.parquet": bytes(range(256)) * 50,
}


@pytest.mark.parametrize("name", CASES)
def test_refused(work: Path, capsys: pytest.CaptureFixture[str], name: str, tally: Tally) -> None:
    (work / name).write_bytes(CASES[name])
    line = told(capsys, prune, flags(work, "--data", str(work / name)))
    assert name in line
    assert not (work / "out").exists()
    tally.survived("data", line)


def test_one_line_is_enough_text(work: Path, tally: Tally) -> None:
    text = " ".join((work / "text.txt").read_text().split())
    (work / "line.txt").write_text(text)
    with confined(work):
        line = outcome(lambda: prune(flags(work, "--data", str(work / "line.txt"), "--dry-run")))
    assert line is None
    tally.survived("data")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "document"), [("many.txt", "abc\n\n"), ("many.jsonl", '{"text": "abc"}\n')]
)
def test_ten_million_short_documents(work: Path, tally: Tally, name: str, document: str) -> None:
    """A few of them, all of them, or more than there are: memory is bounded."""
    with (work / name).open("w") as file:
        for _ in range(100):
            file.write(document * (MANY // 100))
    for samples, is_enough in ((16, True), (MANY // 16, True), (MANY, False)):
        more = ("--data", str(work / name), "--dry-run", "--quiet")
        child = process(flags(work, *more, samples=samples))
        assert child.stderr is not None
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        print(
            f"{name}: {samples} windows, {usage.ru_maxrss / 2**20:.2f} GiB, {usage.ru_utime:.0f} s"
        )
        assert usage.ru_maxrss < MOST_GIB * 2**20
        if is_enough:
            assert (child.returncode, errors) == (0, "")
            tally.survived("data")
        else:
            line = one_line(child.returncode, errors)
            assert "lower --samples" in line
            tally.survived("data", line)
