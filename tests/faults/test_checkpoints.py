"""Checkpoints that are hostile on purpose: links, pipes, code, pickles, names used twice."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_vtrans.prune import prune
from tests.faults.cases import snapshot, told
from tests.faults.conftest import Tally
from tests.faults.guard import confined
from tests.runs import flags
from tests.tiny import save_tiny

WEIGHTS = "model.safetensors"
EVIL = "from pathlib import Path\nPath({!r}).write_text('ran')\nclass Evil: pass\n"


def link_out(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        path = work / "model" / name
        path.rename(work / name)
        path.symlink_to(work / name)

    return damage


def secret_copied(work: Path) -> None:
    (work / "secret").write_text("{}")
    (work / "model" / "generation_config.json").unlink()
    (work / "model" / "generation_config.json").symlink_to(work / "secret")


def pipe(name: str) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        (work / "model" / name).unlink()
        os.mkfifo(work / "model" / name)

    return damage


def zeros(work: Path) -> None:
    (work / "model" / "config.json").unlink()
    (work / "model" / "config.json").symlink_to("/dev/zero")


def huge_config(work: Path) -> None:
    os.truncate(work / "model" / "config.json", 2**40)  # sparse


def changed(**entries: object) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        path = work / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(work: Path) -> None:
        tensors = load_file(work / "model" / WEIGHTS)
        change(tensors)
        save_file(tensors, work / "model" / WEIGHTS, {"format": "pt"})

    return damage


NORM = "model.norm.weight"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights linked from outside": (link_out(WEIGHTS), "leads out of the checkpoint"),
    "config linked from outside": (link_out("config.json"), "leads out of the checkpoint"),
    "secret linked to be copied": (secret_copied, "leads out of the checkpoint"),
    "weights are a pipe": (pipe(WEIGHTS), "no regular file"),
    "config is a pipe": (pipe("config.json"), "no regular file"),
    "config without end": (zeros, "leads out of the checkpoint"),
    "config of 1 TB": (huge_config, "larger than"),
    "a billion layers": (changed(num_hidden_layers=10**9), "num_hidden_layers"),
    "a billion labels": (changed(num_labels=10**9), "num_labels"),
    "negative width": (changed(hidden_size=-24), "config.json"),
    "no heads": (changed(num_attention_heads=0), "config.json"),
    "unknown activation": (changed(hidden_act="evil"), "config.json"),
    "tensor missing": (weights(lambda t: t.pop(NORM)), "missing"),
    "tensor too many": (weights(lambda t: t.update(more=torch.zeros(1))), "does not account for"),
    "weight is NaN": (weights(lambda t: t[NORM].fill_(float("nan"))), "NaN"),
    "weight is infinite": (weights(lambda t: t[NORM].fill_(float("inf"))), "infinite"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES)
def test_refused(work: Path, capsys: pytest.CaptureFixture[str], tally: Tally, case: str) -> None:
    damage, words = CASES[case]
    damage(work)
    with confined(work):
        line = told(capsys, prune, flags(work))
    assert words in line, line
    assert not (work / "out").exists()
    tally.survived("hostile checkpoint", line)


def test_whole_numbers_as_weights(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = work / "model" / WEIGHTS
    save_file({n: t.to(torch.int32) for n, t in load_file(path).items()}, path, {"format": "pt"})
    assert "dtype" in told(capsys, prune, flags(work))


def test_name_used_twice(tmp_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old and a new name of one tensor: neither is picked in silence."""
    model = save_tiny("bert-mlm", tmp_path / "bert")
    tensors = load_file(model / WEIGHTS)
    name = "bert.embeddings.LayerNorm.weight"
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors[name] + 1
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    line = told(capsys, prune, flags(work, "--model", str(model)))
    assert "twice" in line and "embeddings.LayerNorm" in line


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_never_runs(
    work: Path, file: str, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes named by `auto_map`: the stock ones are used, or the run is refused."""
    ran = work / "ran"
    model = work / "model"
    (model / "evil.py").write_text(EVIL.format(str(ran)))
    path = model / file
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {
        name: ["evil.Evil", "evil.Evil"] if "Tok" in name else "evil.Evil" for name in names
    }
    more = {"auto_map": auto_map}
    if file == "tokenizer_config.json":
        more["tokenizer_class"] = "EvilTokenizer"  # type: ignore[assignment]
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with confined(work):
        from llm_vtrans.commands.command import run_command

        status = run_command(prune, flags(work, "--samples", "4", "--quiet"))
    assert not ran.exists()
    assert status in (0, 2)
    if status == 0:
        assert "auto_map" not in json.loads((work / "out" / "config.json").read_text())
        assert not (work / "out" / "evil.py").exists()
    tally.survived("custom code", None if status == 0 else "refused")


def test_finetuning_loads_no_pickle(
    tmp_path: Path, work: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    model = save_tiny("bert-classify", tmp_path / "bert")
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    rows = "".join(json.dumps({"text": f"a b {i}", "label": i % 3}) + "\n" for i in range(24))
    for name in ("train", "validation"):
        (work / f"{name}.jsonl").write_text(rows)
    more = ["--model", str(model), "--data", str(work / "train.jsonl"), "--text-field", "text",
            "--task", "classification", "--finetune-first", "true"]  # fmt: skip
    before = snapshot(work)
    line = told(capsys, prune, [*flags(work), *more])
    assert "safetensors" in line
    assert snapshot(work) == before
    tally.survived("pickles", line)
