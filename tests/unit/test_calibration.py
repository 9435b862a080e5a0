"""Calibration windows: packing, held-out part, determinism."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_vtrans.calibration.text import TextSource, calibrate, documents
from llm_vtrans.embedded import EMBEDDED_MODEL
from llm_vtrans.errors import UserError
from llm_vtrans.tasks.encoding import Examples, with_noise

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


def test_neighbouring_windows_are_spread(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A step sees several documents although a document fills several windows."""
    documents = [f"topic{i} " * 200 for i in range(40)]
    (tmp_path / "long.txt").write_text("\n\n".join(documents))
    data = calibrate(TextSource(str(tmp_path / "long.txt")), tokenizer, 60, 32, seed=0)
    # All but the last of a document's windows repeat its own words alone.
    of_rows = [frozenset(row) for row in data.train.tolist()]
    same = sum(a == b for a, b in pairwise(of_rows))
    assert len(set(of_rows)) < 40 and same < 20


@pytest.mark.parametrize("share", [0.0, 0.15, 0.9])
def test_noise_replaces_a_share_of_the_tokens(share: float) -> None:
    special, rows = 3, torch.arange(6000).remainder(50).view(100, 60)
    tokens = torch.tensor([i for i in range(40) if i != special])
    noisy = with_noise(Examples({"input_ids": rows}), share, tokens, seed=1).tensors["input_ids"]
    changed = noisy != rows
    assert set(noisy[changed].tolist()) <= set(tokens.tolist())
    assert not changed[torch.isin(rows, torch.tensor([special, *range(40, 50)]))].any()
    free = torch.isin(rows, tokens)
    expected = share * (1 - 1 / len(tokens))  # a draw may give what was there
    assert float(changed[free].float().mean()) == pytest.approx(expected, abs=0.03)
    again = with_noise(Examples({"input_ids": rows}), share, tokens, seed=1).tensors["input_ids"]
    assert torch.equal(noisy, again)
