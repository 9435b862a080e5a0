"""Labelled rows -> tensors: padding, and which class a label is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.errors import UserError
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import load_tokenizer, open_source
from llm_vtrans.preparation.planning import task_data
from llm_vtrans.tasks import encoding
from llm_vtrans.tasks.finetuning import finetune_first
from tests.tiny import CONFIGS, ENCODER_WIDTHS, WIDTHS, save_tiny

WORDS = ["<pad>", *"abcdefg"]
NAMES = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
UNNAMED = {i: f"LABEL_{i}" for i in range(3)}


def tokenizer_of_words(**options: Any) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **options)


def labelled(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right(side: str) -> None:
    rows = [{"t": "a b", "l": 0}, {"t": "c d e", "l": 1}, {"t": "a b c d e f g", "l": 1}]
    classes = encoding.classes_of(rows, "l", {})
    tokenizer = tokenizer_of_words(padding_side=side)
    examples = encoding.classification(rows, ("t",), "l", tokenizer, 16, classes)
    batch = next(examples.batches(2, torch.device("cpu")))
    assert batch["input_ids"].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("labels", "own", "numbers"),
    [
        (["NEUTRAL", "ENTAILMENT"], NAMES, [1, 2]),  # as the head was trained
        ([0, 2], NAMES, [0, 2]),
        ([0, 2], UNNAMED, [0, 2]),
        (["2", "0"], UNNAMED, [2, 0]),  # as a table of text has them
        ([2, 1], {0: "1", 1: "2"}, [1, 0]),  # names that are numbers
        ([2, 1], {0: 1, 1: 2}, [1, 0]),
        ([False, True], UNNAMED, [0, 1]),
        (["no", "yes"], UNNAMED, [0, 1]),  # by order where nothing tells
        ([1, 3], {}, [0, 1]),
    ],
)
def test_numbers_of_labels(labels: list[Any], own: dict[int, str], numbers: list[int]) -> None:
    rows = labelled(labels)
    classes = encoding.classes_of(rows, "label", own)
    examples = encoding.classification(rows, ("text",), "label", tokenizer_of_words(), 4, classes)
    assert examples.tensors["labels"].tolist() == numbers


def test_a_class_that_only_validation_has() -> None:
    classes = encoding.classes_of(labelled(["NEUTRAL"]), "label", NAMES)
    rows = labelled(["ENTAILMENT"])
    examples = encoding.classification(rows, ("text",), "label", tokenizer_of_words(), 4, classes)
    assert examples.tensors["labels"].tolist() == [2]


@pytest.mark.parametrize("label", ["entails", 3])
def test_labels_that_the_model_does_not_know(label: Any) -> None:
    with pytest.raises(UserError, match=r"CONTRADICTION, NEUTRAL, ENTAILMENT.*--finetune-first"):
        encoding.classes_of(labelled([label]), "label", NAMES)


def write(folder: Path, labels: list[Any], texts: list[str]) -> Path:
    for split in ("train", "validation"):
        lines = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def test_a_model_that_names_its_classes_agrees_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(
        **ENCODER_WIDTHS, id2label=NAMES, label2id={name: i for i, name in NAMES.items()},
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    monkeypatch.setitem(CONFIGS, "named", config)
    source = open_source(str(save_tiny("named", tmp_path / "model", 3)))
    model = load_model(source, torch.float32, torch.device("cpu"))
    texts = [f"{chr(40 + i)} {chr(80 - i)}" for i in range(16)]
    tokenizer = load_tokenizer(source)
    found = [model(**tokenizer(text, return_tensors="pt")).logits.argmax() for text in texts]
    data = write(tmp_path, [NAMES[int(i)] for i in found], texts)
    args = PruneArguments(model="model", data=str(data), text_field="text", samples=8)
    assert task_data(args, source, 16).evaluate(model, 4)["accuracy"] == 1


@pytest.mark.parametrize(("name", "number"), [("mrpc", 3), ("stsb", 2)])
def test_the_headline_is_a_score_that_a_head_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """MRPC's own, F1, is for two classes, and STS-B's for numbers."""
    config = BertConfig(
        **ENCODER_WIDTHS, num_labels=number, architectures=["BertForSequenceClassification"]
    )
    monkeypatch.setitem(CONFIGS, "three", config)
    source = open_source(str(save_tiny("three", tmp_path / "model")))
    (tmp_path / name).mkdir()
    data = write(tmp_path / name, [0, 1], ["a b", "c d e f"])
    args = PruneArguments(model="model", data=str(data), text_field="text", samples=2)
    task = task_data(args, source, 16)
    found = task.evaluate(load_model(source, torch.float32, torch.device("cpu")), 4)
    assert task.headline in found


def test_token_types_that_a_model_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(
        **{**ENCODER_WIDTHS, "type_vocab_size": 1}, architectures=["BertForSequenceClassification"]
    )
    monkeypatch.setitem(CONFIGS, "one-type", config)
    folder = save_tiny("one-type", tmp_path / "model")
    tokenizer = load_tokenizer(open_source(str(folder))).backend_tokenizer
    tokenizer.post_processor = processors.BertProcessing(("!", 0), ('"', 1))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="#",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    for split in ("train", "validation"):
        rows = [{"a": "a b", "b": "c", "label": label} for label in (0, 1)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = PruneArguments(
        model="model", data=str(tmp_path / "train.jsonl"), text_field="a,b", samples=2
    )
    with pytest.raises(UserError, match="token type 1, the model knows 1"):
        task_data(args, open_source(str(folder)), 16)


def test_a_decoder_that_names_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**WIDTHS, num_labels=2, architectures=["LlamaForSequenceClassification"])
    monkeypatch.setitem(CONFIGS, "padless", config)
    source = open_source(str(save_tiny("padless", tmp_path / "model")))
    data = write(tmp_path, ["no", "yes"], ["a b", "c d e f"])
    args = PruneArguments(model="model", data=str(data), text_field="text", samples=2)
    task = task_data(args, source, 16)
    model = load_model(source, torch.float32, torch.device("cpu"))
    alone = [task.evaluate(model, batch_size)["accuracy"] for batch_size in (1, 2)]
    assert alone[0] == alone[1]


def test_finetuning_names_the_classes(tmp_path: Path) -> None:
    save_tiny("bert-mlm", tmp_path / "model")
    data = write(tmp_path, ["yes", "no"], ["a b", "c d e f"])
    args = PruneArguments(
        model=str(tmp_path / "model"), data=str(data), text_field="text", task="classification",
        batch_size=2, seq_len=16, finetune_epochs=1, output=str(tmp_path / "out"), quiet=True,
    )  # fmt: skip
    with_dense = finetune_first(args)
    assert with_dense is not None
    config = AutoConfig.from_pretrained(with_dense.model)
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
