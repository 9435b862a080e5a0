"""`eval/compare_variants.py` on a tiny encoder: one table, exact budgets, reruns that continue."""

import json
from pathlib import Path

import pytest

from eval.compare_variants import BATCH_SIZES, run
from llm_vtrans.errors import UserError
from tests.integration.test_tasks import encoder as encoder
from tests.integration.test_tasks import write
from tests.runs import write_inputs

METHODS = ["faster", "fast", "vtrans", "random", "magnitude"]


def test_every_method_meets_the_budget(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write(tmp_path, "classification"))
    flags = [
        *("--model", str(encoder), "--task", "classification", "--data", data),
        *("--finetune-first", "true", "--finetune-epochs", "1", "--text-field", "sentence"),
        *("--seq-len", "16", "--samples", "16", "--batch-size", "2", "--data-fraction", "0.5"),
        *("--sparsity", "0.4", "--output", str(tmp_path / "out")),
    ]
    run([*flags, "--methods", *METHODS[2:]])
    run([*flags, "--methods", *METHODS])  # the finished ones are read
    shown = capsys.readouterr()
    assert shown.err.count("magnitude 0.4") == 1
    with pytest.raises(UserError, match="results of other options; choose another --output"):
        run([*flags, "--methods", *METHODS, "--learning-rate", "0.02"])
    dense, *rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["method"] for row in rows] == METHODS
    for row in rows:
        assert row["parameters"] <= 0.6 * dense["parameters"]
        assert 0 <= row["accuracy"] <= 1
        assert all(row[f"speedup, batch {size}"] > 0 for size in BATCH_SIZES)
    trained = {row["method"]: row["steps"] for row in rows}
    assert trained == {"faster": 8, "fast": 4, "vtrans": 8, "random": 0, "magnitude": 0}


def test_a_language_model_on_the_default_number_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path, num_paragraphs=250)
    run(
        [
            *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")),
            *("--output", str(tmp_path / "out"), "--seq-len", "16", "--batch-size", "1"),
            *("--sparsity", "0.5", "--methods", "random", "--shrink-every", "0"),
        ]
    )
    assert "perplexity" in capsys.readouterr().out
    dense, pruned = json.loads((tmp_path / "out" / "table.json").read_text())
    assert pruned["parameters"] <= 0.5 * dense["parameters"]
