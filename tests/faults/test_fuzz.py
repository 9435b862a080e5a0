"""Damaged and hostile files: a clean result or one line, whatever lies in them."""

import json
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.commands.export import flags_of
from llm_vtrans.commands.publish import publish
from llm_vtrans.job import Job
from llm_vtrans.loading.checkpoint import INDEX_FILE, SINGLE_FILE
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import open_source
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.preparation.planning import make_problem, window_length
from llm_vtrans.record.masks_file import MASKS_FILE
from llm_vtrans.record.output_folder import MANIFEST_FILE
from llm_vtrans.record.verification import Subject, verify
from llm_vtrans.report.command import report
from llm_vtrans.report.record import RunRecord
from llm_vtrans.training.preemption import Preemption
from tests.faults.conftest import Tally
from tests.faults.guard import confined, outcome
from tests.faults.mutations import counts, damaged_bytes, damaged_json, fuzz
from tests.runs import QUICK_CHECKS, flags
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "bert-mlm", "roberta-classify")


def use(folder: Path) -> None:
    """All that a run does with a checkpoint up to its first forward pass, that one included."""
    source = open_source(str(folder))
    args = PruneArguments(model=str(folder))
    make_problem(args, source, CPU)
    window_length(args, source)
    assert source.checkpoint.sha256
    model = load_model(source, torch.float32, CPU)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Parsed header and data part of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


@counts(100, 3000)
def test_headers(folder: Path, tally: Tally, num_cases: int) -> None:
    path = folder / SINGLE_FILE
    header, data = header_of(path.read_bytes())

    def case(raw: bytes) -> None:
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        tally.survived("safetensors header", outcome(lambda: use(folder)))

    with confined(folder):
        fuzz(num_cases, damaged_json(header, ("more.self_attn.rotary_emb.inv_freq",)), case)


@counts(50, 2000)
def test_bytes(folder: Path, tally: Tally, num_cases: int) -> None:
    path = folder / SINGLE_FILE
    whole = path.read_bytes()

    def case(data: bytes) -> None:
        path.write_bytes(data)
        tally.survived("safetensors bytes", outcome(lambda: use(folder)))

    with confined(folder):
        fuzz(num_cases, damaged_bytes(whole) | damaged_bytes(whole[:3000]), case)


@counts(60, 2000)
def test_indices(folder: Path, tally: Tally, num_cases: int) -> None:
    (folder / SINGLE_FILE).unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / INDEX_FILE).read_text())

    def case(raw: bytes) -> None:
        (folder / INDEX_FILE).write_bytes(raw)
        tally.survived("index", outcome(lambda: use(folder)))

    with confined(folder):
        fuzz(num_cases, damaged_json(index, ("weight_map", "more")), case)


@counts(15, 500)
@pytest.mark.parametrize("family", FAMILIES)
def test_configs(tmp_path: Path, tally: Tally, family: str, num_cases: int) -> None:
    folder = save_tiny(family, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    more = (
        "auto_map", "quantization_config", "num_labels", "attn_implementation",
        "_attn_implementation", "rope_scaling", "torch_dtype", "layer_types", "id2label",
    )  # fmt: skip

    def case(raw: bytes) -> None:
        path.write_bytes(raw)
        tally.survived("config.json", outcome(lambda: use(folder)))

    with confined(folder):
        fuzz(num_cases, damaged_json(config, more), case)


@counts(40, 1500)
def test_masks(finished: Path, tmp_path: Path, tally: Tally, num_cases: int) -> None:
    """Up to the check that comes before the model is loaded, and the reports' own reading."""
    folder = copytree(finished, tmp_path / "work")
    path = folder / "out" / MASKS_FILE
    whole = path.read_bytes()
    header, data = header_of(whole)
    args = parse(flags(folder, "--masks", str(folder / "out"), "--overwrite"))
    job = Job.prepare(args, Preemption())

    def use_masks() -> None:
        job._known()
        RunRecord.read(folder / "out")

    def case(raw: bytes) -> None:
        path.write_bytes(raw)
        tally.survived(MASKS_FILE, outcome(use_masks))

    headers = damaged_json(header).map(lambda raw: struct.pack("<Q", len(raw)) + raw + data)
    with confined(folder):
        fuzz(num_cases, headers | damaged_bytes(whole), case)


@counts(40, 1500)
def test_manifests(finished: Path, tmp_path: Path, tally: Tally, num_cases: int) -> None:
    """Every reader of vtrans.json: report, publish, verify, export."""
    run = copytree(finished / "out", tmp_path / "out")
    path = run / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    readers: list[Callable[[], object]] = [
        lambda: report([str(run)]),
        lambda: publish([str(run), "--repo", "a/b", "--dry-run"]),
        lambda: list(verify(Subject.open(run), QUICK_CHECKS)),
        lambda: flags_of(run),
    ]

    def case(raw: bytes) -> None:
        path.write_bytes(raw)
        for read in readers:
            tally.survived(MANIFEST_FILE, outcome(read))

    with confined(run):
        fuzz(num_cases, damaged_json(manifest) | damaged_bytes(path.read_bytes()), case)


@counts(60, 1000)
def test_recipes(tmp_path: Path, tally: Tally, num_cases: int) -> None:
    path = tmp_path / "recipe.yaml"
    tree = {f.name: f.default for f in fields(PruneArguments) if f.name != "config"}

    def case(raw: bytes) -> None:
        path.write_bytes(raw)
        tally.survived("recipe", outcome(lambda: parse(["--config", str(path)])))

    with confined(tmp_path):
        fuzz(num_cases, damaged_json(tree) | damaged_bytes(yaml.safe_dump(tree).encode()), case)


def test_a_recipe_that_grows(tmp_path: Path, tally: Tally) -> None:
    """Aliases of aliases: a few bytes of YAML that would be gigabytes of text."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([*lines, "model: *a8"]))
    with confined(tmp_path):
        line = outcome(lambda: parse(["--config", str(path)]))
    assert line is not None
    tally.survived("recipe", line)
