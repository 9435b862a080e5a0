"""JSON Lines, a row at a time: the reader of pyarrow, which `datasets` uses, can crash on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_vtrans.errors import UserError

SUFFIX = ".jsonl"
LONGEST_LINE = 2**26  # bytes: memory is bounded


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the object of each line that is not blank.

    Raises:
        UserError: a line is no object of JSON in UTF-8, or too long.
    """
    with file.open("rb") as data:
        lines = iter(lambda: data.readline(LONGEST_LINE), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"longer than {LONGEST_LINE} bytes")
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                if b"\\ud" in line.lower():  # half of a pair stands for no character
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"--data {file}: line {number} cannot be read as {SUFFIX} ({error}): repair or "
                    "convert it"
                ) from error
            yield row
