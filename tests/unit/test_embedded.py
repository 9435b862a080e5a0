"""The embedded corpus splits cleanly, and the embedded model has learned from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_vtrans.commands.command import run_command
from llm_vtrans.embedded import EMBEDDED_MODEL, corpus, pretrain
from llm_vtrans.prune import prune as prune_job

SEQ_LEN = 256
WINDOWS = 32
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every tiny matrix crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def keys(documents: list[str]) -> list[str]:
    return [key for document in documents for key in corpus.paragraph_keys(document)]


def test_no_heldout_paragraph_is_in_the_training_text() -> None:
    training, heldout = keys(corpus.training_documents()), keys(corpus.heldout_documents())
    assert len(heldout) > 100
    assert len(training) > 10_000
    assert not set(training) & set(heldout)
    assert len(training) == len(set(training))


def test_split_is_deterministic() -> None:
    assert corpus.heldout_documents.__wrapped__() == corpus.heldout_documents()
    sources = corpus._stdlib_sources()
    assert sources == sorted(set(sources)) == corpus._stdlib_sources()


def test_split_depends_on_the_topics_names_only() -> None:
    topics = dict(corpus._topics())
    heldout = [name for name in topics if corpus._is_heldout(name)]
    assert 0.08 < len(heldout) / len(topics) < 0.16
    assert {"assignment", "objects", "strings"} <= set(heldout)


def test_unparsable_source_has_no_docstrings(tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_bytes(b'"""Text."""\ndef f(:\n')
    assert corpus._docstrings(source) == []
    source.write_bytes(b'"""Text."""\n\xff\n')
    assert corpus._docstrings(source) == []


def test_docstrings_come_in_source_order(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""A."""\nif True:\n  class C:\n    """B."""\n    def f(): "C."\nasync def g(): "D."'
    )
    assert corpus._docstrings(source) == ["A.", "B.", "C.", "D."]


def test_folder_is_small_and_records_its_training() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.rglob("*")) <= 4 * MEGABYTE
    record = json.loads((EMBEDDED_MODEL / "pretraining.json").read_text(encoding="utf-8"))
    assert record["unigram_perplexity"] >= 5 * record["heldout_perplexity"]
    defaults = vars(pretrain.build_parser().parse_args(["--output", "unused"]))
    assert record["settings"] == {
        **{name: value for name, value in defaults.items() if name != "output"},
        "data": "embedded corpus",
    }


def test_stock_loading_gives_a_model_that_beats_the_unigram_five_times() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(model, LlamaForCausalLM)
    assert 1e6 <= model.num_parameters() <= 2e6
    training = pretrain.encode(tokenizer, corpus.training_documents())
    heldout = pretrain.encode(tokenizer, corpus.heldout_documents())[: WINDOWS * SEQ_LEN]
    unigram = pretrain.unigram_perplexity(training, heldout, SEQ_LEN, len(tokenizer))
    assert unigram >= 5 * pretrain.model_perplexity(model, heldout, SEQ_LEN)


def test_tokenizer_is_lossless() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = corpus.heldout_documents()[0] + "\n\t  é 漢 🙂"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id not in ids


def test_perplexities_of_known_models() -> None:
    tokens = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    uniform = pretrain.unigram_perplexity(torch.arange(4), tokens, seq_len=3, vocab_size=4)
    assert uniform == pytest.approx(4)
    # Targets are 1, 2 | 0, 1: the first of each window, and the lone last token, are context.
    counts = torch.tensor([1, 1, 1])  # smoothed: 1, 4, 1, 1 of 7
    skewed = pretrain.unigram_perplexity(counts, tokens, seq_len=3, vocab_size=4)
    assert skewed == pytest.approx((7 / 4 * 7 * 7 * 7 / 4) ** (1 / 4))


def tiny_run(tmp_path: Path, *flags: str) -> int:
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(f"the cat number {i} sat on the mat" for i in range(300)))
    sizes = "--hidden-size 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-size 16"
    run = "--vocab-size 300 --seq-len 16 --batch-size 4 --tokens-per-parameter 0.05"
    output = ["--output", str(tmp_path / "model"), "--data", str(data)]
    return pretrain.main([*output, *sizes.split(), *run.split(), *flags])


def test_script_pretrains_on_user_text(tmp_path: Path) -> None:
    assert tiny_run(tmp_path, "--tie-embeddings") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    record = (tmp_path / "model" / "pretraining.json").read_text(encoding="utf-8")
    assert json.loads(record)["settings"]["data"] == ["text.txt"]
    assert str(tmp_path) not in record
    assert not (tmp_path / "model.unfinished").exists()


@pytest.mark.parametrize(
    ("family", "auto_class"),
    [
        ("gemma", AutoModelForCausalLM),
        ("gpt2", AutoModelForCausalLM),
        ("mistral", AutoModelForCausalLM),
        ("qwen2", AutoModelForCausalLM),
        ("qwen3", AutoModelForCausalLM),
        ("roberta", AutoModelForMaskedLM),
    ],
)
def test_script_pretrains_other_families(tmp_path: Path, family: str, auto_class: Any) -> None:
    """They learn, and the product takes what was written."""
    assert tiny_run(tmp_path, "--family", family, "--tokens-per-parameter", "2") == 0
    model = auto_class.from_pretrained(tmp_path / "model")
    assert model.config.model_type == family
    record = json.loads((tmp_path / "model" / "pretraining.json").read_text(encoding="utf-8"))
    assert record["heldout_perplexity"] < record["unigram_perplexity"]
    data = tmp_path / "text.txt"
    prune = ["--model", str(tmp_path / "model"), "--data", str(data), "--seq-len", "16"]
    assert run_command(prune_job, [*prune, "--samples", "8", "--batch-size", "2", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "absent.txt"], "cannot read --data"),
        (["--num-heads", "3"], "--hidden-size"),
        (["--num-kv-heads", "3"], "--num-kv-heads"),
        (["--family", "qwen3", "--num-kv-heads", "3"], "--num-kv-heads"),
        (["--seq-len", "512"], "--seq-len"),
        (["--seq-len", "200", "--vocab-size", "100"], "--vocab-size"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--output", "."], "exists"),
    ],
)
def test_script_names_the_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert tiny_run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
