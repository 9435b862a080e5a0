"""Each ablation of the comparison takes away what its name says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.baselines import Case
from eval.comparison.ablations import ABLATIONS, Labels, ablation_of
from eval.comparison.ours import Ours
from llm_vtrans.families import family_for
from llm_vtrans.loading.source import open_source
from llm_vtrans.masking.attachment import MaskedModel
from llm_vtrans.prune import prune
from tests.runs import SEQ_LEN, copy_inputs, flags, trained_tensors, write_inputs
from tests.tiny import tiny_model
from tests.unit.test_exactness import inputs_for


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Path, folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Manifest and masks of a run without one of the levers."""
    ablation = ABLATIONS[name]
    copy_inputs(inputs, folder)
    prune([*flags(folder, "--quiet", samples=24), *ablation.options], ablation.kind)
    out = folder / "out"
    return json.loads((out / "vtrans.json").read_text()), trained_tensors(out)


def test_labels_are_the_models_own_loss() -> None:
    model = tiny_model("llama")
    inputs = inputs_for(model.config, 0)
    labels = Labels(MaskedModel(model, family_for("llama").describe(model.config)))
    expected = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(labels.loss(inputs, labels.teach(inputs)), expected)
    torch.testing.assert_close(labels(inputs, {})["loss"], expected)


def test_without_a_teacher(inputs: Path, tmp_path: Path) -> None:
    manifest, _ = run(inputs, tmp_path, "ours-no-distillation")
    assert manifest["params"]["after"] <= manifest["budget"]["target"]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["distillation"]
    assert first > 1  # nats: nobody guesses random letters


def test_without_mu(inputs: Path, tmp_path: Path) -> None:
    _, masks = run(inputs, tmp_path, "ours-no-mu")
    trained = [tensor for name, tensor in masks.items() if name.startswith("mu.")]
    assert trained and all(bool((mu == 1).all()) for mu in trained)
    assert any(bool(masks[name].std() > 0) for name in masks if name.startswith("log_var."))


@pytest.mark.parametrize("name", ["ours-no-local-search", "ours-no-oblique-basis"])
def test_masks_keep_their_own_dimensions(inputs: Path, tmp_path: Path, name: str) -> None:
    """The oblique basis keeps the first ones of its own."""
    manifest, masks = run(inputs, tmp_path, name)
    kept = masks["keep.hidden"].bool()
    alpha = masks["log_var.hidden"] - torch.log(masks["mu.hidden"].square() + 1e-8)
    best = alpha.argsort()[: int(kept.sum())]
    assert 0 < kept.sum() < len(kept) and bool(kept[best].all())
    assert manifest["params"]["after"] <= manifest["budget"]["target"]


def test_without_regression(inputs: Path, tmp_path: Path) -> None:
    """The same masks and plan; what tuning starts from is further from the teacher."""
    losses, kept = [], []
    for name in ("ours", "ours-no-regression"):
        ablation = ablation_of(name)
        copy_inputs(inputs, folder := tmp_path / name)
        options = ("--quiet", "--log-every", "1", "--prune", "hidden")
        prune([*flags(folder, *options, samples=24), *ablation.options], ablation.kind)
        lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        losses.append(next(m["distillation"] for m in metrics if m["step"] > len(metrics) // 2))
        kept.append(trained_tensors(folder / "out")["keep.hidden"])
    assert torch.equal(*kept)
    assert losses[0] < losses[1]


@pytest.mark.parametrize("name", ["ours", "ours-no-rehearsal"])
def test_without_rehearsal(
    inputs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = ablation_of(name)
    copy_inputs(inputs, tmp_path)
    options = ("--sparsity", "0.3", *ablation.options)  # where plans differ
    prune([*flags(tmp_path, samples=320), *options], ablation.kind)
    assert ("rehearsed: " in capsys.readouterr().out) == (name == "ours")


def test_a_training_for_each_size(inputs: Path, tmp_path: Path) -> None:
    source = open_source(str(inputs / "model"))
    trainings: dict[str, set[float]] = {}
    costs, seconds = {}, {}
    for name in ("ours", "ours-no-reuse"):
        folder = tmp_path / name
        lever = None if name == "ours" else name
        ours = Ours(str(inputs / "model"), str(inputs / "text.txt"), 256, SEQ_LEN, folder, lever)
        for sparsity in (0.3, 0.5):
            (scratch := tmp_path / f"{name}-{sparsity}").mkdir()
            windows = torch.zeros(0, SEQ_LEN, dtype=torch.long)
            case = Case(source, windows, windows, sparsity, True, 0, scratch, torch.device("cpu"))
            pruned = ours.prune(case)
            assert pruned.num_params <= (1 - sparsity) * source.architecture.num_parameters
            costs[name, sparsity] = pruned.cost
        for manifest in (json.loads((run / "vtrans.json").read_text()) for run in folder.iterdir()):
            settings, phases = manifest["settings"], manifest["phases"]
            if settings["masks"] is None:
                trainings.setdefault(name, set()).add(settings["sparsity"])
            took = [
                phase["seconds"] for phase_name, phase in phases.items() if phase_name != "score"
            ]
            seconds[name, settings["sparsity"]] = sum(took)
    assert trainings == {"ours": {0.5}, "ours-no-reuse": {0.3, 0.5}}
    seconds["ours", 0.3] += seconds["ours", 0.5]  # which gave the masks
    assert {key: cost.seconds for key, cost in costs.items()} == pytest.approx(seconds)
