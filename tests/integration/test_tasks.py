"""The main job on every task: a pretrained tiny encoder becomes a pruned task model."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.repocard_data import model_index_to_eval_results
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_vtrans.errors import UserError
from llm_vtrans.export.per_layer_modeling import AUTO_CLASSES
from llm_vtrans.prune import prune
from llm_vtrans.record.model_card import front_matter
from llm_vtrans.record.verification import CHECKS, Subject, verify
from llm_vtrans.tasks import HEADS
from tests.tiny import VOCAB_SIZE, save_tiny

WORDS = [f"w{i}" for i in range(VOCAB_SIZE - 5)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NUM_VALIDATION = 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model with a tokenizer of whole words."""
    folder = save_tiny("bert-mlm", tmp_path_factory.mktemp("encoder"))
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def rows(kind: str, num: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    def row() -> dict[str, Any]:
        if kind == "qa":
            words = draw.choices(WORDS, k=8)
            at = draw.randrange(8)
            answers = {"text": [words[at]], "answer_start": [len(" ".join([*words[:at], ""]))]}
            return {"question": text(3), "context": " ".join(words), "answers": answers}
        if kind == "multiple-choice":
            return {"start": text(4), "a": text(2), "b": text(3), "label": draw.randrange(2)}
        label = draw.random() if kind == "regression" else draw.choice(["no", "yes"])
        return {"sentence": text(draw.randint(2, 10)), "label": label}

    return [row() for _ in range(num)]


def write(folder: Path, kind: str) -> Path:
    for seed, (name, num) in enumerate((("train", 40), ("validation", NUM_VALIDATION))):
        lines = (json.dumps(row) for row in rows(kind, num, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


@pytest.mark.parametrize("layout", ["stock", "per-layer"])
@pytest.mark.parametrize(
    ("kind", "columns", "scores"),
    [
        ("classification", "sentence", {"accuracy", "f1", "matthews"}),
        ("regression", "sentence", {"spearman", "pearson"}),
        ("multiple-choice", "start,a,b", {"accuracy"}),
        ("qa", "", {"f1", "exact_match"}),
    ],
)
def test_labelled_task(
    tmp_path: Path,
    encoder: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    columns: str,
    scores: set[str],
    layout: str,
) -> None:
    data = write(tmp_path, kind)
    arguments = [
        *("--model", str(encoder), "--task", kind, "--data", str(data), "--layout", layout),
        *("--finetune-first", "true", "--finetune-epochs", "1", "--seq-len", "24"),
        *("--samples", "16", "--batch-size", "4", "--sparsity", "0.4"),
        *("--output", str(tmp_path / "out"), *(["--text-field", columns] if columns else [])),
        "--json",
    ]
    prune(arguments)
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "out")  # and no more
    manifest = json.loads((tmp_path / "out" / "vtrans.json").read_text())
    for stage in ("dense", "pruned"):
        assert set(manifest["scores"][stage]) == scores
    # After two steps all spans of an answer score alike but for rounding: one of them may change.
    tolerance = 1e-3 + (1 / NUM_VALIDATION if kind == "qa" else 0)
    assert manifest["score"]["tuned"] == pytest.approx(manifest["score"]["pruned"], abs=tolerance)
    card = front_matter((tmp_path / "out" / "README.md").read_text())
    _, results = model_index_to_eval_results(card["model-index"])
    assert {r.metric_type: r.metric_value for r in results} == pytest.approx(
        manifest["scores"]["pruned"], abs=1e-6
    )
    auto = getattr(transformers, AUTO_CLASSES[HEADS[kind]])
    model = auto.from_pretrained(tmp_path / "out").eval()
    shape = (1, 2, 9) if kind == "multiple-choice" else (2, 9)
    tokens = torch.randint(5, VOCAB_SIZE, shape)
    assert all(bool(x.isfinite().all()) for x in model(tokens).values())
    assert model.num_parameters() <= 0.6 * manifest["params"]["before"]
    verified = list(verify(Subject.open(tmp_path / "out")))
    assert [f.check for f in verified if not f.is_failure and not f.is_skipped] == list(CHECKS)
    manifest["score"]["pruned"] += 0.1
    findings = list(verify(Subject(tmp_path / "out", manifest), ("perplexity",)))
    assert [f.is_failure for f in findings] == [True] and "stated" in findings[0].text


def test_masked_language_model(tmp_path: Path, encoder: Path) -> None:
    text = "\n\n".join(row["sentence"] for row in rows("", 400, 0))
    (tmp_path / "text.txt").write_text(text)
    prune(
        [
            *("--model", str(encoder), "--data", str(tmp_path / "text.txt"), "--seq-len", "16"),
            *("--samples", "32", "--batch-size", "4", "--sparsity", "0.3"),
            *("--output", str(tmp_path / "out")),
        ]
    )
    manifest = json.loads((tmp_path / "out" / "vtrans.json").read_text())
    score = manifest["score"]
    assert manifest["headline"] == "pseudo_perplexity" and score["pruned"] > 1
    assert score["tuned"] == pytest.approx(score["pruned"], rel=1e-3)


def finetuned(folder: Path, encoder: Path, *more: str) -> list[str]:
    """Options of a run that finetunes first; its result goes to `folder/out`."""
    data = folder / "train.jsonl"
    return [
        *("--model", str(encoder), "--task", "classification", "--text-field", "sentence"),
        *("--data", str(data if data.exists() else write(folder, "classification"))),
        *("--finetune-first", "true", "--finetune-epochs", "1", "--seq-len", "24"),
        *("--samples", "8", "--batch-size", "4", "--sparsity", "0.4", "--quiet"),
        *("--output", str(folder / "out"), *more),
    ]


def test_a_dry_run_finetunes_nothing(tmp_path: Path, encoder: Path) -> None:
    prune(finetuned(tmp_path, encoder, "--dry-run", "true"))
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "validation.jsonl"}


def test_what_lies_in_the_way_is_found_before_finetuning(tmp_path: Path, encoder: Path) -> None:
    """A finished result keeps the dense model that it belongs to; other files are nobody's."""
    other = ("--finetune-learning-rate", "1e-4")
    prune(finetuned(tmp_path, encoder))
    weights = tmp_path / "out-dense" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UserError, match="out: is not empty; pass --overwrite"):
        prune(finetuned(tmp_path, encoder, *other))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="out-dense: is not empty; pass --overwrite"):
        prune(finetuned(tmp_path, encoder, *other))
    assert weights.read_bytes() == before
    prune(finetuned(tmp_path, encoder, *other, "--overwrite", "true"))
    assert weights.read_bytes() != before
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out-dense" / "finetuning.json").unlink()
    with pytest.raises(UserError, match=r"has no finetuning\.json, so it is no earlier result"):
        prune(finetuned(tmp_path, encoder, "--overwrite", "true"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "qa"], "--finetune-first"),
        (["--finetune-first", "true"], "needs --task"),
        (["--task", "classification", "--finetune-first", "true"], "--text-field"),
        (
            ["--task", "classification", "--finetune-first", "true", "--text-field", "words"],
            "no column 'words'",
        ),
    ],
)
def test_told_in_one_line(tmp_path: Path, encoder: Path, more: list[str], message: str) -> None:
    data = write(tmp_path, "classification")
    with pytest.raises(UserError, match=message):
        prune(
            ["--model", str(encoder), "--data", str(data), "--output", str(tmp_path / "o"), *more]
        )
