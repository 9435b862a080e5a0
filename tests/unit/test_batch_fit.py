"""`--batch-size auto`: the step stays, memory says in how many parts it is taken."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_vtrans.arguments import PruneArguments
from llm_vtrans.loading.model import load_model
from llm_vtrans.loading.source import Source, open_source
from llm_vtrans.preparation import batch_fit
from llm_vtrans.preparation.batch_fit import has_room, split_step
from llm_vtrans.preparation.command_line import parse
from llm_vtrans.preparation.resources import (
    CPU_PROCESS_BYTES,
    MARGIN,
    Workload,
    estimate_memory,
    host_memory,
    memory_limits,
)
from tests.tiny import save_tiny

SEQ_LEN = 128
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(save_tiny("llama", tmp_path_factory.mktemp("model"))))


def filled(*flags: str) -> PruneArguments:
    return parse(["--batch-size", "auto", "--dtype", "float32", *flags]).filled(SEQ_LEN, 1)


def planned(source: Source, batch_size: int) -> int:
    """Bytes that training takes by `plan`, whose estimate begins with the process itself."""
    stored = torch.float32.itemsize
    work = Workload(batch_size, SEQ_LEN, dtype_bytes=4, stored_bytes=stored)
    vocab_size = source.config.vocab_size
    return estimate_memory(source.architecture, vocab_size, work, CPU_PROCESS_BYTES, 1.0).train


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(accumulation=st.integers(1, 12), share=st.floats(0, 1.2))
def test_a_step_is_split_as_memory_asks(
    source: Source, monkeypatch: pytest.MonkeyPatch, accumulation: int, share: float
) -> None:
    args = filled("--gradient-accumulation", str(accumulation))
    num = args.global_batch(1)
    assert num == 16 * accumulation
    least, whole = planned(source, 1), planned(source, num)
    limit = least + share * (whole - least) + 1
    monkeypatch.setattr(batch_fit, "_memory", lambda device: limit / MARGIN)
    found = split_step(args, source, SEQ_LEN, Accelerator(cpu=True))
    assert found.global_batch(1) == num
    assert planned(source, found.batch_size) <= limit + 1
    larger = [size for size in range(found.batch_size + 1, num + 1) if num % size == 0]
    assert all(planned(source, size) > limit - 1 for size in larger)


def test_what_does_not_fit_is_tried_with_one(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_fit, "_memory", lambda device: 1.0)
    found = split_step(filled(), source, SEQ_LEN, Accelerator(cpu=True))
    assert (found.batch_size, found.gradient_accumulation) == (1, 16)


def test_a_second_network_needs_room(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(["--batch-size", "3", "--dtype", "float32"]).filled(SEQ_LEN, 1)
    second = 4 * sum(p.numel() for p in load_model(source, torch.float32, CPU).parameters())
    for missing in (0, 1):
        memory = (planned(source, 3) + second - missing + 0.5) / MARGIN
        monkeypatch.setattr(batch_fit, "_memory", lambda device, memory=memory: memory)
        assert has_room(args, source, SEQ_LEN, Accelerator(cpu=True)) is not bool(missing)


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [("0::/slurm/job_7", "slurm/job_7", "memory.max"),
     ("9:cpu,memory:/slurm/job_7", "memory/slurm/job_7", "memory.limit_in_bytes")],
)  # fmt: skip
def test_a_batch_system_s_limit_counts(line: str, folder: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(f"3:cpuset:/other\n{line}\n")
    inner = tmp_path / "mounted" / folder
    inner.mkdir(parents=True)
    assert memory_limits(tmp_path / "groups", tmp_path / "mounted") == []
    (inner / name).write_text("max\n" if name == "memory.max" else str(2**63 - 4096))
    (inner.parent / name).write_text(f"{16 * 2**30}\n")
    assert min(memory_limits(tmp_path / "groups", tmp_path / "mounted")) == 16 * 2**30
    assert memory_limits(tmp_path / "nowhere") == []
    assert 0 < host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_recipe_may_say_auto(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("batch_size: auto\n", encoding="utf-8")
    assert parse(["--config", str(tmp_path / "recipe.yaml")]).batch_size == 0
