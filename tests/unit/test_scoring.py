"""Perplexity against a plain loop, standard errors, and the offline tasks' prompts."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api import metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llm_vtrans.errors import UserError
from llm_vtrans.scoring import harness
from llm_vtrans.scoring.perplexity import (
    jackknife_estimate,
    ratio_estimate,
    text_documents,
    text_windows,
    token_perplexity,
    window_nlls,
)

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "eval" / "tasks"
ORIGINALS = Path(lm_eval.__file__).parent / "tasks"
VOCABULARY = 37


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=0.5,  # so that a forgotten eval() shows
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_losses(model: LlamaForCausalLM, windows: Tensor) -> list[list[float]]:
    """Nats of each predicted token, one prefix at a time."""
    model.eval()
    return [
        [
            -math.log(model(window[None, :end]).logits[0, -1].double().softmax(-1)[window[end]])
            for end in range(1, len(window))
        ]
        for window in windows
    ]


class ByteTokenizer:
    """One token per byte; asserts that no special token is asked for."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


class TestTokenPerplexity:
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
    def test_equals_a_plain_loop_also_with_a_ragged_last_batch(self, model, windows, batch_size):
        losses = plain_losses(model, windows)
        model.train()
        result = token_perplexity(model, windows, batch_size)
        assert result.nll == pytest.approx(np.mean(losses), rel=1e-5)
        assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert (result.num_tokens, result.context_length) == (5 * 8, 9)
        sums = window_nlls(model, windows, batch_size)
        assert sums.dtype == torch.float64
        np.testing.assert_allclose(sums, np.sum(losses, axis=1), rtol=1e-5)

    def test_uniform_model_has_the_perplexity_of_its_vocabulary(self, model, windows):
        torch.nn.init.zeros_(model.lm_head.weight)
        assert token_perplexity(model, windows).value == pytest.approx(VOCABULARY, rel=1e-6)

    def test_modes_and_gradients_stay_as_they_were(self, model, windows):
        model.train()
        model.model.layers[0].eval()
        token_perplexity(model, windows)
        assert model.training and not model.model.layers[0].training
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_autocast_of_the_caller_is_off(self, model, windows):
        expected = token_perplexity(model, windows).nll
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert token_perplexity(model, windows).nll == expected

    @pytest.mark.parametrize("shape", [(0, 4), (3, 1), (4,)])
    def test_nothing_to_predict_is_an_error(self, model, shape):
        with pytest.raises(UserError, match="num_windows >= 1"):
            token_perplexity(model, torch.zeros(shape, dtype=torch.int64))


class TestTextWindows:
    def test_documents_are_joined_and_the_ragged_end_dropped(self):
        windows = text_windows(ByteTokenizer(), ["abc", "defgh"], 4)
        assert windows.dtype == torch.int64
        assert bytes(windows.flatten().tolist()) == b"abc\n\ndef"
        assert windows.shape == (2, 4)

    def test_limit_counts_windows(self):
        assert text_windows(ByteTokenizer(), ["abcdefgh"], 2, limit=3).shape == (3, 2)

    def test_less_than_a_window_is_an_error(self):
        with pytest.raises(UserError, match="3 tokens, less than one window of 4"):
            text_windows(ByteTokenizer(), ["abc"], 4)

    def test_a_file_keeps_its_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
        documents = text_documents(str(tmp_path / "a.txt"), tmp_path)
        assert documents == ["one\ntwo", "three\n"]
        with pytest.raises(UserError, match=r"ppl:wikitext2, .* or ppl:FILE.txt"):
            text_documents("wikitext3", tmp_path)
        with pytest.raises(UserError, match="--data-dir"):
            text_documents("general", tmp_path)


class TestEstimates:
    def test_mean_has_the_textbook_error(self):
        items = [1.0, 0.0, 0.0, 1.0, 1.0]
        estimate = ratio_estimate(items, np.ones(5))
        assert estimate.value == pytest.approx(0.6)
        assert estimate.stderr == pytest.approx(metrics.mean_stderr(items))
        assert jackknife_estimate(metrics.mean, items).stderr == pytest.approx(estimate.stderr)

    def test_delta_method_agrees_with_the_jackknife(self):
        random = np.random.default_rng(0)
        weights = random.integers(50, 100, 80)
        items = [
            (-float(w) * x, int(w)) for w, x in zip(weights, random.normal(3, 0.1, 80), strict=True)
        ]
        for aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
            delta, jackknife = (
                harness._estimate(aggregate, items),
                jackknife_estimate(aggregate, items),
            )
            assert delta.value == pytest.approx(jackknife.value) == pytest.approx(aggregate(items))
            assert delta.stderr == pytest.approx(jackknife.stderr, rel=0.02)

    def test_difference_is_paired(self):
        dense = ratio_estimate([0.0, 1.0, 2.0, 3.0], np.ones(4))
        pruned = ratio_estimate([0.5, 1.5, 2.5, 3.5], np.ones(4))
        difference = pruned.minus(dense)
        assert (difference.value, difference.stderr) == (pytest.approx(0.5), pytest.approx(0.0))
        other = ratio_estimate([0.0, 1.0], np.ones(2))
        assert pruned.minus(other).stderr == pytest.approx(math.hypot(pruned.stderr, other.stderr))

    def test_a_single_unit_has_no_error(self):
        assert math.isnan(ratio_estimate([1.0], [2.0]).stderr)
        assert math.isnan(jackknife_estimate(metrics.median, [1.0]).stderr)

    def test_group_is_the_average_of_all_documents(self):
        items = {"a": [1.0, 0.0, 1.0], "b": [0.0, 1.0, 0.0, 0.0, 1.0]}
        scores = {
            name: [
                harness.Score(
                    name, "acc", harness._estimate(metrics.mean, x), True, {"num_documents": len(x)}
                )
            ]
            for name, x in items.items()
        }
        config = SimpleNamespace(metric="acc", filter_list=None, weight_by_size=True)
        leaves = [SimpleNamespace(task_name=name) for name in items]
        group: Any = SimpleNamespace(aggregate_metric_list=[config], get_all_tasks=lambda: leaves)
        (score,) = harness._group_scores("both", group, scores)
        assert score.estimate.value == pytest.approx(metrics.mean(items["a"] + items["b"]))
        errors = [3 / 8 * metrics.mean_stderr(items["a"]), 5 / 8 * metrics.mean_stderr(items["b"])]
        assert score.estimate.stderr == pytest.approx(math.hypot(*errors))


class TestTasks:
    def test_unknown_task_names_near_matches(self, tmp_path, monkeypatch):
        # Indexing the harness's 14,000 own names takes most of a minute: see the slow test.
        ours = functools.partial(TaskManager, include_defaults=False)
        monkeypatch.setattr(
            harness, "TaskManager", lambda include_path, **_: ours(include_path=include_path)
        )
        with pytest.raises(UserError, match=r"unknown task 'piqa_locale': did you mean piqa_local"):
            harness.load_tasks(["piqa_locale"], TASKS, tmp_path)

    @pytest.mark.slow
    def test_the_harness_own_names_are_known(self):
        manager = harness._find_tasks(["piqa", "piqa_local"], TASKS)
        assert {"mmlu", "ai2_arc", "arc_easy_local"} <= set(manager.all_tasks)
        with pytest.raises(UserError, match="did you mean .*hellaswag"):
            harness._find_tasks(["hellaswagg"], TASKS)

    def test_missing_data_names_file_and_flag(self, tmp_path):
        file = re.escape(str(tmp_path / "zeroshot" / "piqa" / "validation.jsonl"))
        with pytest.raises(UserError, match=rf"piqa_local needs the file {file}: set --data-dir"):
            harness.load_tasks(["piqa_local"], TASKS, tmp_path)

    def test_names_data_and_references(self):
        """Every task file is named as its task, and its data lie where score.py looks for them."""
        for path in TASKS.glob("*.yaml"):
            config = load_yaml(path)
            assert config["task"] == path.stem
            files = config.get("dataset_kwargs", {}).get("data_files", {})
            assert all(file.startswith(harness.DATA_PREFIX) for file in files.values())

    def test_embedded_heldout_is_the_corpus(self, tmp_path):
        from llm_vtrans.embedded.corpus import heldout_documents

        tasks = harness.load_tasks(["embedded_heldout"], TASKS, tmp_path)
        documents = tasks.tasks["embedded_heldout"].eval_docs
        assert [document["text"] for document in documents] == heldout_documents()


def original(path: str, rows: list[dict[str, Any]], monkeypatch) -> ConfigurableTask:
    """The harness's own task on our rows in place of the hub's data set."""
    from datasets import Dataset, DatasetDict

    config = load_yaml(ORIGINALS / path)
    splits = {config[key] for key in ("training_split", "validation_split", "test_split")
              if config.get(key)}  # fmt: skip
    data = DatasetDict({split: Dataset.from_list(rows) for split in splits})
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda *_, **__: data)
    config.pop("tag", None)
    return ConfigurableTask(config=config)


def requests(task: Any) -> list[tuple[Any, ...]]:
    """What the model is asked: every (context, continuation)."""
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


OFFLINE = {
    "piqa": ("piqa/piqa.yaml", "zeroshot/piqa/validation.jsonl"),
    "boolq": ("super_glue/boolq/default.yaml", "zeroshot/boolq/validation.jsonl"),
    "arc_easy": ("arc/arc_easy.yaml", "zeroshot/arc_easy/test.jsonl"),
    "arc_challenge": ("arc/arc_challenge.yaml", "zeroshot/arc_challenge/test.jsonl"),
    "winogrande": ("winogrande/default.yaml", "zeroshot/winogrande/validation.jsonl"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "zeroshot/openbookqa/test.jsonl"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "zeroshot/lambada/test.jsonl"),
}


@pytest.fixture
def excerpt(shared, tmp_path) -> Path:
    """A data folder with the first rows of every file, so that loading takes no time."""
    for yaml_path in TASKS.glob("*.yaml"):
        files = load_yaml(yaml_path).get("dataset_kwargs", {}).get("data_files", {})
        for file in (file.removeprefix(harness.DATA_PREFIX) for file in files.values()):
            lines = (shared / "data" / file).read_text().splitlines(keepends=True)
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("".join(lines[: 8 if file.endswith("jsonl") else 400]))
    return tmp_path


class TestOfflineTasksAskWhatTheHarnessAsks:
    @pytest.mark.parametrize("name", OFFLINE)
    def test_zero_shot(self, name, excerpt, monkeypatch):
        path, file = OFFLINE[name]
        rows = [json.loads(line) for line in (excerpt / file).read_text().splitlines()]
        local = harness.load_tasks([f"{name}_local"], TASKS, excerpt).tasks[f"{name}_local"]
        theirs = original(path, rows, monkeypatch)
        assert len(requests(local)) >= 8
        assert requests(local) == requests(theirs)
        for row in rows:
            assert local.doc_to_text(row) == theirs.doc_to_text(row)
            assert local.doc_to_target(row) == theirs.doc_to_target(row)
        assert local.aggregation() == theirs.aggregation()
        assert local.higher_is_better() == theirs.higher_is_better()
        assert local.VERSION == theirs.VERSION

    def test_wikitext(self, excerpt, monkeypatch):
        local = harness.load_tasks(["wikitext_local"], TASKS, excerpt).tasks["wikitext_local"]
        pages = [document["page"] for document in local.eval_docs]
        text = (excerpt / "text/wikitext2/test.txt").read_text()
        assert text == " \n" + "\n".join(pages) and len(pages) > 1
        assert all(re.match(r" = [^=]", page) for page in pages)
        theirs = original("wikitext/wikitext.yaml", [{"page": page} for page in pages], monkeypatch)
        assert requests(local) == requests(theirs)
        assert local.aggregation() == theirs.aggregation()
        document = {"page": pages[1]}
        assert local.process_results(document, (-5.0,)) == theirs.process_results(document, (-5.0,))


def test_task_files_are_found_by_the_unmodified_harness():
    """`lm_eval --include_path eval/tasks` must index every file of ours."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert set(manager.all_tasks) == {path.stem for path in TASKS.glob("*.yaml")}
    assert not any("!function" in yaml.dump(entry.cfg) for entry in manager.task_index.values())
