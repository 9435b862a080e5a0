"""Bad input: status 2, one line that says what to do, and nothing touched."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_vtrans.commands.command import USER_ERROR, run_command
from llm_vtrans.prune import prune
from tests.faults.cases import one_line
from tests.runs import flags, start, write_inputs
from tests.tiny import save_tiny, tiny_model

SHARD = "model-00001-of-"
Damage = Callable[[Path], list[str]]  # damages the inputs in a folder, returns further flags


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs; the checkpoint has several shards."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "model" / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder / "model", max_shard_size="20KB")
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the inputs to damage."""
    return copytree(inputs, tmp_path, dirs_exist_ok=True)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones included, with a hash of its bytes."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in folder.rglob("*")
    }


def first_shard(work: Path) -> Path:
    return next((work / "model").glob(f"{SHARD}*"))


def with_flags(*more: str) -> Damage:
    return lambda _: list(more)


def with_recipe(text: str) -> Damage:
    def damage(work: Path) -> list[str]:
        (work / "recipe.yaml").write_text(text)
        return ["--config", str(work / "recipe.yaml")]

    return damage


def with_config(**changes: object) -> Damage:
    def damage(work: Path) -> list[str]:
        path = work / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return []

    return damage


def with_model(name: str, *more: str) -> Damage:
    return lambda work: ["--model", str(save_tiny(name, work / name)), *more]


def with_data(name: str, content: bytes, *more: str) -> Damage:
    def damage(work: Path) -> list[str]:
        (work / name).write_bytes(content)
        return ["--data", str(work / name), *more]

    return damage


def missing_shard(work: Path) -> list[str]:
    first_shard(work).unlink()
    return []


def truncated_shard(work: Path) -> list[str]:
    shard = first_shard(work)
    shard.write_bytes(shard.read_bytes()[:-5])
    return []


def corrupt_header(work: Path) -> list[str]:
    shard = first_shard(work)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\x00]["
    shard.write_bytes(data)
    return []


def absurd_header_length(work: Path) -> list[str]:
    shard = first_shard(work)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    return []


def only_pickles(work: Path) -> list[str]:
    for path in (work / "model").glob("model*"):
        path.unlink()
    torch.save({}, work / "model" / "pytorch_model.bin")
    return []


def no_config(work: Path) -> list[str]:
    (work / "model" / "config.json").unlink()
    return []


def no_tokenizer(work: Path) -> list[str]:
    for path in (work / "model").glob("tokenizer*"):
        path.unlink()
    return []


def bad_weight(value: float) -> Damage:
    def damage(work: Path) -> list[str]:
        shard = first_shard(work)
        tensors = load_file(shard)
        tensors[sorted(tensors)[0]].view(-1)[7] = value
        save_file(tensors, shard, {"format": "pt"})
        return []

    return damage


def full_output(work: Path) -> list[str]:
    (work / "out").mkdir()
    (work / "out" / "vtrans.json").write_text("{}")
    return []


def finished_run(work: Path) -> list[str]:
    return [*full_output(work), "--resume"]


def foreign_output(work: Path) -> list[str]:
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").write_text("mine")
    return ["--overwrite"]


def overwrite_from_bad_weights(work: Path) -> list[str]:
    """An earlier result with its metrics, which the failing run may not touch."""
    full_output(work)
    (work / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    return [*bad_weight(float("nan"))(work), "--overwrite"]


def output_is_a_file(work: Path) -> list[str]:
    (work / "out").write_text("mine")
    return ["--overwrite"]


def output_below_a_file(work: Path) -> list[str]:
    return ["--output", str(work / "text.txt" / "sub")]


# What happens -> the damage and what its line must say: cause, value, remedy.
CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    **{
        f"sparsity {value}": (with_flags("--sparsity", value), ("--sparsity", value, "(0, 1)"))
        for value in ("0", "1", "1.5", "-0.1", "nan")
    },
    "rotation of a norm's bias into a head without one": (
        with_model("gpt2-untied", "--rotate", "pca"),
        ("--rotate pca", "gpt2"),
    ),
    "rotation of layer norms that are trained": (
        with_model("gpt2", "--rotate", "pca", "--variant", "vtrans"),
        ("--rotate pca", "vtrans", "faster"),
    ),
    "sparsity out of reach": (
        with_flags("--sparsity", "0.9999"),
        ("unreachable", "smallest model has", "lower --sparsity"),
    ),
    "params out of reach": (with_flags("--params", "20"), ("20 params", "unreachable", "smallest")),
    "params no number": (with_flags("--params", "many"), ("--params", "'many'", "3.4B")),
    "params of nothing": (with_flags("--params", "0.5"), ("--params", "0.5", "3.4B")),
    "params above dense": (with_flags("--params", "1T"), ("--params 1T", "14,280", "smaller")),
    "both budgets": (
        with_flags("--params", "9K", "--sparsity", "0.5"),
        ("--sparsity", "--params", "one of them"),
    ),
    "one budget of several": (with_flags("--budgets", "0.3,1.3"), ("--budgets must", "1.3")),
    "unknown flag": (with_flags("--sparsness", "0.5"), ("--sparsness", "--help")),
    "flag without value": (with_flags("--config"), ("--config", "expected one", "--help")),
    "no number": (with_flags("--samples", "few"), ("--samples", "'few'", "--help")),
    "negative seed": (with_flags("--seed", "-1"), ("--seed", "-1", "at least 0")),
    "endless finetuning": (with_flags("--finetune-epochs", "inf"), ("--finetune-epochs", "inf")),
    "no finetuning rate": (
        with_flags("--finetune-learning-rate", "-1"),
        ("--finetune-learning-rate", "above 0"),
    ),
    "huge seed": (with_flags("--seed", str(2**32)), ("--seed", str(2**32), "below")),
    "unknown layout": (with_flags("--layout", "tall"), ("--layout", "'tall'", "per-layer")),
    "unknown structure": (
        with_flags("--prune", "ffn,tails"),
        ("--prune", "tails", "hidden, heads"),
    ),
    "unknown recipe key": (with_recipe("sparsness: 0.5"), ("recipe.yaml", "sparsness", "sparsity")),
    "recipe not YAML": (with_recipe("sparsity: ["), ("--config", "recipe.yaml")),
    "recipe absent": (with_flags("--config", "absent.yaml"), ("--config", "absent.yaml")),
    "model absent": (with_flags("--model", "./absent"), ("--model ./absent", "no such folder")),
    "unknown family": (
        with_config(model_type="mamba"),
        ("'mamba'", "not supported", "llama, mistral, qwen2, qwen3"),
    ),
    "missing shard": (missing_shard, (SHARD, "not in the folder", "again")),
    "truncated shard": (truncated_shard, (SHARD, "truncated", "again")),
    "corrupt header": (corrupt_header, (SHARD, "header is not JSON", "again")),
    "absurd header length": (absurd_header_length, (SHARD, "header", "again")),
    "other hidden size": (
        with_config(hidden_size=48),
        (SHARD, "shape", "48", "not of the same model"),
    ),
    "invalid hidden size": (with_config(hidden_size=25), ("config.json", "25")),
    "other depth": (with_config(num_hidden_layers=4), ("model.layers.3.", "missing", "restore")),
    "only pickles": (only_pickles, ("pytorch_model.bin", "pickles", "save_pretrained")),
    "no config": (no_config, ("config.json", "no such file", "save_pretrained")),
    "no tokenizer": (no_tokenizer, ("model", "no usable tokenizer")),
    "NaN in a weight": (bad_weight(float("nan")), (SHARD, "NaN", "damaged")),
    "infinite weight": (bad_weight(float("inf")), (SHARD, "infinite", "damaged")),
    "empty data": (with_data("empty.txt", b""), ("empty.txt", "0 tokens", "bring more text")),
    "blank data": (with_data("blank.txt", b"\n \n"), ("blank.txt", "0 tokens", "bring more text")),
    "too few tokens": (
        with_flags("--samples", "5000"),
        ("text.txt", "--samples 5000", "lower --samples"),
    ),
    "empty jsonl": (with_data("empty.jsonl", b""), ("empty.jsonl",)),
    "no text field": (
        with_data("rows.jsonl", b'{"body": "a b"}\n' * 9),
        ("rows.jsonl", "'text'", "body", "--text-field"),
    ),
    "other text field": (
        with_data("rows.jsonl", b'{"body": "a b"}\n' * 9, "--text-field", "prose"),
        ("rows.jsonl", "'prose'", "body", "--text-field"),
    ),
    "broken jsonl": (with_data("rows.jsonl", b'{"text": "a"}\n{"te'), ("rows.jsonl", "read as")),
    "broken parquet": (with_data("rows.parquet", b"PAR1?"), ("rows.parquet", "read as")),
    "jsonl not UTF-8": (with_data("rows.jsonl", b'{"text": "\xff\xfe"}\n'), ("rows.jsonl",)),
    "data absent": (with_flags("--data", "absent.txt"), ("--data absent.txt", "no such file")),
    "data of unknown kind": (with_data("text.doc", b"a"), ("text.doc", ".txt")),
    "data not UTF-8": (
        with_data("latin.txt", b"caf\xe9 " * 500),
        ("latin.txt", "UTF-8", "byte 3", "convert"),
    ),
    "sequence too long": (with_flags("--seq-len", "65"), ("--seq-len 65", "context of 64")),
    "batch above samples": (
        with_flags("--batch-size", "32"),
        ("--samples 16", "--batch-size 32", "does not fill"),
    ),
    "output not empty": (full_output, ("out", "not empty", "--overwrite")),
    "foreign output": (foreign_output, ("out", "vtrans.json", "not deleted", "another --output")),
    "output is a file": (output_is_a_file, ("out", "is a file", "another --output")),
    "output below a file": (output_below_a_file, ("text.txt", "no writable", "another --output")),
    "resume of a finished run": (finished_run, ("out", "not empty", "--overwrite")),
    "earlier result stays": (overwrite_from_bad_weights, (SHARD, "NaN")),
}
AS_PROCESSES = ("sparsity 1.5", "unknown flag", "NaN in a weight")


@pytest.mark.parametrize("case", CASES)
def test_one_line(work: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    damage, words = CASES[case]
    arguments = flags(work) + damage(work)
    before = contents(work)
    capsys.readouterr()  # the library may have told of a model that was saved
    line = one_line(run_command(prune, arguments), capsys.readouterr().err)
    assert [word for word in words if word not in line] == [], line
    assert contents(work) == before


@pytest.mark.parametrize("case", AS_PROCESSES)
def test_one_line_of_a_process(work: Path, case: str) -> None:
    damage, words = CASES[case]
    arguments = flags(work) + damage(work)
    before = contents(work)
    process = start(arguments)
    _, errors = process.communicate()
    line = one_line(process.returncode, errors)
    assert [word for word in words if word not in line] == [], line
    assert contents(work) == before


# Adam's first step has the learning rate's size: the second forward pass overflows.
UNSTABLE = ("--learning-rate", "1e30", "--save-every", "1", "--tune-share", "0")


@pytest.mark.parametrize(
    ("log_every", "name"), [(1, "loss is nan"), (100, "became NaN or infinite")]
)
def test_nan_in_training(
    work: Path, capsys: pytest.CaptureFixture[str], log_every: int, name: str
) -> None:
    """The line names step and term; what was saved before stays and is finite."""
    arguments = flags(work, *UNSTABLE, "--log-every", str(log_every))
    line = one_line(run_command(prune, arguments), capsys.readouterr().err)
    words = ("step 2", name, "lower --learning-rate", "--overwrite")
    assert [word for word in words if word not in line] == [], line
    saved = {path.relative_to(work / "out") for path in (work / "out").rglob("*.*")}
    metrics = {Path("state/metrics.jsonl")} if log_every == 1 else set()
    assert saved == {Path("state/training.safetensors"), *metrics}
    with safe_open(work / "out/state/training.safetensors", framework="pt") as state:
        assert state.metadata()["step"] == "1"
        assert all(torch.isfinite(state.get_tensor(name)).all() for name in state.keys())  # noqa: SIM118
    assert [path.name for path in work.glob(".*")] == []


def test_nan_leaves_an_earlier_result(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_output(work)
    (work / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(work)
    one_line(run_command(prune, flags(work, *UNSTABLE, "--overwrite")), capsys.readouterr().err)
    after = contents(work)
    state = {name for name in after if name.startswith("out/state")}
    assert state == {"out/state", "out/state/metrics.jsonl", "out/state/training.safetensors"}
    assert {name: digest for name, digest in after.items() if name not in state} == before


@pytest.fixture
def unfinished(work: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Inputs and the saved state of a run that failed after its first step."""
    assert run_command(prune, flags(work, *UNSTABLE)) == USER_ERROR
    assert (work / "out/state/training.safetensors").is_file()
    capsys.readouterr()
    return work


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ("unfinished run", "--resume", "--overwrite")),
        (("--dry-run",), ("unfinished run", "--resume", "--overwrite")),
        (("--resume", "--seed", "7"), ("seed", "0", "7", "same settings", "--overwrite")),
        (("--resume", "--sparsity", "0.3"), ("sparsity", "0.5", "0.3", "same settings")),
        (("--resume", "--batch-size", "4"), ("global_batch", "2", "4", "same settings")),
    ],
)
def test_unfinished_run_is_not_lost(
    unfinished: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    before = contents(unfinished)
    status = run_command(prune, flags(unfinished, *UNSTABLE, *more))
    line = one_line(status, capsys.readouterr().err)
    assert [word for word in words if word not in line] == [], line
    assert contents(unfinished) == before


def test_resume_of_other_weights(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", seed=1).save_pretrained(unfinished / "model", max_shard_size="20KB")
    before = contents(unfinished)
    capsys.readouterr()
    status = run_command(prune, flags(unfinished, *UNSTABLE, "--resume"))
    line = one_line(status, capsys.readouterr().err)
    assert "checkpoint" in line and "--overwrite" in line
    assert contents(unfinished) == before


def test_resume_of_a_damaged_state(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = unfinished / "out/state/training.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    before = contents(unfinished)
    status = run_command(prune, flags(unfinished, *UNSTABLE, "--resume"))
    line = one_line(status, capsys.readouterr().err)
    assert str(state) in line and "--overwrite" in line
    assert contents(unfinished) == before
