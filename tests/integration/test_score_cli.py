"""eval/score.py as its user runs it: a process of its own, on one rank and on two."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from llm_vtrans import score as score_command
from llm_vtrans.commands.command import run_command
from llm_vtrans.scoring.perplexity import text_windows, token_perplexity

ROOT = Path(__file__).resolve().parents[2]
SCORE = ROOT / "eval" / "score.py"
TEXT = "\n\n".join(f"The {i}th sentence counts {i * i} words, or so it says." for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and two random models `dense` and `pruned` with a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    for seed, name in enumerate(("dense", "pruned")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder


def score(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run it as a process in `folder`: only its own path leads to the package there."""
    # `accelerate launch --cpu --num_processes 2` starts a single process: it leaves CPU ranks to
    # MPI. torchrun sets the variables that accelerate reads.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), str(SCORE), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=250,
    )


COMPARE = ("--model", "pruned", "--baseline", "dense", "--context-length", "16", "--limit", "5",
           "--tasks", "ppl:text.txt,embedded_heldout", "--output")  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(folder) -> subprocess.CompletedProcess[str]:
    return score(folder, *COMPARE, "one.json")


def test_table_and_json(folder, one_rank):
    assert one_rank.returncode == 0, one_rank.stderr
    header, rule, *rows = one_rank.stdout.splitlines()
    assert header.split() == ["task", "metric", "dense", "pruned", "difference", "protocol"]
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["ppl:text.txt"] + 3 * ["embedded_heldout"]
    assert "non-overlapping windows" in rows[0] and "context_length 16" in rows[0]
    assert "tokens 75" in rows[0] and "rolling" in rows[1] and "max_length 64" in rows[1]
    report = json.loads((folder / "one.json").read_text())
    assert not list(folder.glob(".*"))
    assert report["settings"]["tasks"] == ["ppl:text.txt", "embedded_heldout"]
    assert report["settings"]["limit"] == 5
    assert {"python", "torch", "transformers", "lm_eval"} <= set(report["versions"])
    task = report["results"]["ppl:text.txt"]
    assert task["protocol"]["num_tokens"] == 75 and task["protocol"]["num_documents"] == 60
    columns = task["metrics"]["perplexity"]
    difference = columns["pruned"]["value"] - columns["dense"]["value"]
    assert columns["difference"]["value"] == pytest.approx(difference)
    assert columns["difference"]["stderr"] > 0


def test_perplexity_is_that_of_the_library(folder, one_rank):
    report = json.loads((folder / "one.json").read_text())
    columns = report["results"]["ppl:text.txt"]["metrics"]["perplexity"]
    for name in ("dense", "pruned"):
        model = LlamaForCausalLM.from_pretrained(folder / name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / name)
        windows = text_windows(tokenizer, [TEXT], 16, limit=5)
        expected = token_perplexity(model, windows).value
        assert columns[name]["value"] == pytest.approx(expected, rel=1e-6)


def test_two_ranks_agree_with_one(folder, one_rank):
    two = score(folder, *COMPARE, "two.json", ranks=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout == one_rank.stdout
    reports = [json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two")]
    assert [report["settings"]["num_processes"] for report in reports] == [1, 2]
    ours, theirs = ([*numbers(report["results"])] for report in reports)
    assert len(ours) > 20 and theirs == pytest.approx(ours, rel=1e-5)


def numbers(node):
    """Every finite number of a JSON tree, in order."""
    if isinstance(node, dict):
        for value in node.values():
            yield from numbers(value)
    elif isinstance(node, int | float) and math.isfinite(node):
        yield node


def test_a_mistake_ends_in_one_line(folder):
    result = score(folder, "--model", "dense", "--tasks", "ppl:wikitext3", "--output", "x.json")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown task 'ppl:wikitext3': choose ppl:wikitext2,")
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "x.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "nowhere"], "no usable checkpoint at nowhere: "),
        (["--tasks", "ppl:missing.txt"], "task ppl:missing.txt cannot read missing.txt"),
        (["--tasks", "ppl:wikitext2", "--data-dir", "."], "set --data-dir to its folder"),
        (["--tasks", "piqa_local", "--data-dir", "."], "piqa_local needs the file zeroshot/piqa"),
        (["--tasks", ","], "--tasks names no task"),
        (["--limit", "0"], "argument --limit: must be an integer of at least 1, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--output", "no/x.json"], "--output no/x.json cannot be written: No such file"),
        (["--output", "dense"], "--output dense cannot be written: dense is a folder"),
        (["--context-length", "65"], "--context-length 65 is more than the models' 64 positions"),
        (["--context-length", "1"], "--context-length must be at least 2"),
        (["--baseline", "other"], "tokenise differently"),
        (["--baseline", "judge"], "judge: holds a LlamaForSequenceClassification, no causal"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(folder, capsys, monkeypatch, changes, message):
    if not (folder / "other").exists():
        LlamaConfig.from_pretrained(folder / "dense").save_pretrained(folder / "other")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet)
        tokenizer.train_from_iterator([], trainer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "other")
        config = LlamaConfig.from_pretrained(folder / "dense")
        LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(score_command, "score_model", None)
    arguments = ["--model", "dense", "--tasks", "ppl:text.txt", "--output", "x.json",
                 "--context-length", "16", *changes]  # fmt: skip
    assert run_command(score_command.run, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.count("error: ") == 1
