"""Calibration windows: packing, held-out part, determinism."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_vtrans.calibration import TextSource, calibrate, documents
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError

TEXTS = [f"Document {i}: " + f"word{i} " * (20 + i % 7) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    return tokenizer


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(TEXTS) + "\n")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    else:
        Dataset.from_dict({"body": TEXTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix)
    for data in (path, tmp_path):  # the file, and the folder that holds it
        found = documents(TextSource(str(data), text_field="body"))
        assert [text.strip() for text in found] == [text.strip() for text in TEXTS]


def test_windows_are_full_disjoint_and_seeded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = TextSource(str(write(tmp_path, ".txt")))
    data = calibrate(source, tokenizer, num_samples=40, seq_len=32, seed=1)
    assert data.train.shape == (40, 32)
    assert data.heldout.shape[1] == 32

    def numbers(windows: torch.Tensor) -> set[str]:
        texts = tokenizer.batch_decode(windows)
        # Windows cut words at their ends.
        return {w for text in texts for w in text.split()[1:-1] if w.startswith("word")}

    whole = {f"word{i}" for i in range(len(TEXTS))}
    assert numbers(data.heldout) & whole
    assert not numbers(data.heldout) & numbers(data.train) & whole
    again = calibrate(source, tokenizer, num_samples=40, seq_len=32, seed=1)
    other = calibrate(source, tokenizer, num_samples=40, seq_len=32, seed=2)
    assert torch.equal(data.train, again.train)
    assert not torch.equal(data.train, other.train)


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = TextSource(str(write(tmp_path, ".txt")))
    with pytest.raises(UserError, match="lower --samples"):
        calibrate(source, tokenizer, num_samples=10_000, seq_len=32, seed=0)
