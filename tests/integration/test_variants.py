"""The variants that train weights, end to end on tiny models of two kinds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_vtrans.allocation.choosing import hard_gates
from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.job import Job
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.prune import prune
from llm_vtrans.record.manifest import score_of_stages
from llm_vtrans.record.verification import Subject, verify
from llm_vtrans.training.preemption import Preemption
from tests.integration.test_resume import hashes, metrics
from tests.integration.test_tasks import encoder as encoder
from tests.integration.test_tasks import write
from tests.runs import HALVES, flags, write_inputs
from tests.tiny import VOCAB_SIZE, save_tiny

RATE = ("--weight-learning-rate", "1e-3")


@dataclass(frozen=True)
class Inputs:
    """A model with data for it; `flags(*more)` is the command line."""

    folder: Path
    arguments: Callable[..., list[str]]


@pytest.fixture(params=["llama", "bert-classify"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path, encoder: Path) -> Inputs:
    if request.param == "llama":
        write_inputs(tmp_path)
        return Inputs(tmp_path, lambda *more: flags(tmp_path, *RATE, *more))
    save_tiny("bert-classify", tmp_path / "model")
    for file in encoder.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    given = [
        *("--model", str(tmp_path / "model"), "--data", str(write(tmp_path, "classification"))),
        *("--text-field", "sentence", "--seq-len", "16", "--samples", "16", "--batch-size", "2"),
        *("--output", str(tmp_path / "out"), "--log-every", "1", *RATE),
    ]
    return Inputs(tmp_path, lambda *more: [*given, *more])


@pytest.mark.parametrize("layout", ["stock", "per-layer"])
@pytest.mark.parametrize("variant", ["vtrans", "fast"])
def test_weights_are_trained_and_exported(inputs: Inputs, variant: str, layout: str) -> None:
    """What is written computes what the hard-masked network with its trained weights did."""
    more = ["--data-fraction", "0.5"] if variant == "fast" else []
    job = Job.prepare(
        parse(inputs.arguments("--variant", variant, "--layout", layout, *more)), Preemption()
    )
    assert job.settings.num_steps == (4 if variant == "fast" else 8)
    job.load()
    before = {name: p.clone() for name, p in job.masked.model.named_parameters()}
    for stage in (job.search, job.tune):
        if stage == job.tune:
            job.allocate()
        stage()
        after = dict(job.masked.model.named_parameters())
        changed = {name for name, p in after.items() if not p.equal(before[name])}
        assert changed == {name for name, p in after.items() if p.requires_grad}
        assert len(changed) >= len(after) - len([n for n in after if "norm" in n])
        before = {name: p.clone() for name, p in after.items()}
    masked, gates = job.masked, hard_gates(job.plan, torch.device("cpu"))
    job.export()

    out = inputs.folder / "out"
    assert not (out / "state").exists()
    assert json.loads((out / "vtrans.json").read_text())["settings"]["variant"] == variant
    pruned = job.source.auto_class.from_pretrained(out).eval()
    tokens = torch.randint(5, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))
    masked.set_gates(gates)
    with torch.no_grad():
        expected, written = masked(tokens), pruned(tokens).logits
    assert float((expected - written).abs().max() / expected.abs().max()) < 1e-4
    terms = [set(line) for line in metrics(inputs.folder)]
    assert all(("task" in line) == (job.data.kind == "classification") for line in terms)
    assert all({"distillation", "hidden"} <= line for line in terms)


def stops(*quick: tuple[str, int], slow: Sequence[tuple[str, int]]) -> pytest.MarkDecorator:
    """Parameters: a kind of inputs, and after which step of the training it is stopped."""
    cases = [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]
    return pytest.mark.parametrize(("inputs", "stop"), cases, indirect=["inputs"])


# Of four steps of either stage.
@stops(("llama", 6), ("bert-classify", 2), slow=[("llama", 2), ("bert-classify", 6)])
def test_resumed_is_uninterrupted(
    inputs: Inputs, stop: int, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = inputs.arguments(
        "--variant", "vtrans", "--save-every", "1", "--shard-size", "10KB", *HALVES
    )
    check_resumed(inputs, given, stop, tmp_path_factory.mktemp("old"), monkeypatch)


# Of 24 steps of the search; it shrinks every third.
@stops(("llama", 21), slow=[("llama", 17), ("bert-classify", 17), ("bert-classify", 21)])
def test_a_network_that_shrinks_is_resumed(
    inputs: Inputs, stop: int, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = inputs.arguments(
        *("--variant", "vtrans", "--shrink-every", "3", "--samples", "96", "--save-every", "1"),
        *("--learning-rate", "1", "--shard-size", "10KB", *HALVES),
    )
    removed = check_resumed(inputs, given, stop, tmp_path_factory.mktemp("old"), monkeypatch)
    assert removed[0] == 0 and removed == sorted(removed)
    assert 0 < removed[stop - 1] <= removed[-1] < 0.6  # a later plan may want other units
    assert not [f for f in verify(Subject.open(inputs.folder / "out")) if f.is_failure]


def check_resumed(
    inputs: Inputs, given: list[str], stop: int, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """A run that is stopped after a step and resumed ends as one that is not.

    Returns:
        What the network had lost, step by step of the search.
    """
    from llm_vtrans import job as module

    prune(given)
    expected = hashes(inputs.folder), metrics(inputs.folder), scores(inputs.folder)
    (inputs.folder / "out").rename(elsewhere / "out")

    save = module.save_state

    def interrupt(folder: Path, step: int, *rest: object) -> None:
        save(folder, step, *rest)  # type: ignore[arg-type]
        if step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(given)
    monkeypatch.undo()
    prune([*given, "--resume"])
    assert (hashes(inputs.folder), metrics(inputs.folder), scores(inputs.folder)) == expected
    return [line["removed"] for line in expected[1] if "removed" in line]


def scores(folder: Path) -> dict[str, float]:
    return score_of_stages(json.loads((folder / "out" / "vtrans.json").read_text()))


def test_its_masks_serve_no_other_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(write_inputs(tmp_path))
    assert run_command(prune, [*given, "--variant", "vtrans"]) == 0
    reuse = ["--masks", str(tmp_path / "out"), "--output", str(tmp_path / "other")]
    for more in ([], ["--variant", "vtrans"]):
        assert run_command(prune, [*given, *reuse, *more]) == USER_ERROR
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and "vtrans" in error[0] and "--masks" in error[0]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data-fraction", "0.5"], "--variant fast"),
        (["--variant", "vtrans", "--data-fraction", "0.5"], "--variant fast"),
        (["--variant", "fast", "--data-fraction", "0"], "(0, 1]"),
        (["--variant", "fast", "--samples", "80", "--batch-size", "8"], "--data-fraction 0.03"),
        (["--variant", "vtrans", "--weight-learning-rate", "0"], "--weight-learning-rate"),
        (["--variant", "vtrans", "--temperature", "-1"], "--temperature"),
        (["--variant", "vtrans", "--dtype", "float16"], "bfloat16"),
        (["--shrink-every", "10"], "--variant vtrans or fast"),
        (["--variant", "vtrans", "--shrink-every", "-1"], "--shrink-every"),
    ],
)
def test_told_in_one_line(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(prune, more) == USER_ERROR
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]


def test_defaults_of_samples() -> None:
    def num(*arguments: str) -> int:
        return parse(list(arguments)).filled(512, 2).num_samples()

    assert num() == 900 * 8 and num("--variant", "vtrans") == 10_000 * 8
    assert num("--variant", "fast") == 300 * 8
    assert num("--variant", "fast", "--samples", "1000", "--data-fraction", "0.1") == 100


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    given = flags(write_inputs(tmp_path), "--variant", "vtrans", "--dtype", "bfloat16")
    prune(given)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}  # the dense one's
