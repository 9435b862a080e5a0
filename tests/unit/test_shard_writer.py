import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_vtrans.export.shard_writer import ShardWriter, file_parts
from llm_vtrans.loading.checkpoint import DTYPES, Checkpoint

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2, shape).to(dtype)


def write_all(folder: Path, tensors: dict[str, Tensor], shard_size: int) -> dict[str, str]:
    plan = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = ShardWriter(folder, plan, shard_size)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(specs=specs, shard_size=st.integers(1, 400))
def test_round_trip(
    tmp_path: Path, specs: list[tuple[tuple[int, ...], str]], shard_size: int
) -> None:
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {
        f"t{i}": random_tensor(shape, DTYPES[dtype]) for i, (shape, dtype) in enumerate(specs)
    }
    digests = write_all(folder, tensors, shard_size)

    assert digests.keys() == {path.name for path in folder.iterdir()} - {"config.json"}
    for file_name, digest in digests.items():
        assert hashlib.sha256((folder / file_name).read_bytes()).hexdigest() == digest
    loaded: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        shard = load_file(path)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= shard_size
        loaded |= shard
    checkpoint = Checkpoint.open(folder)
    assert loaded.keys() == tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in tensors.items():
        for other in (loaded[name], checkpoint.read(name)):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert torch.equal(
                other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            )


def test_names_index_and_metadata(tmp_path: Path) -> None:
    tensors = {name: torch.arange(4.0) for name in "abc"}
    digests = write_all(tmp_path, tensors, shard_size=32)
    assert list(digests) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    with safe_open(tmp_path / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_tensor_has_a_shard_to_itself(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1), "big": torch.zeros(99), "b": torch.zeros(1)}
    assert len(write_all(tmp_path, tensors, shard_size=8)) == 4


def test_transposed_tensor_is_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_all(tmp_path, {"a": tensor}, shard_size=100)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)


@pytest.mark.parametrize("shard_size", [4_000_000, 1_000_000_000])
def test_transformers_loads_a_copy(shared: Path, tmp_path: Path, shard_size: int) -> None:
    source = shared / "models" / "ref-llama"
    checkpoint = Checkpoint.open(source)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    write_all(tmp_path, {name: checkpoint.read(name) for name in checkpoint.tensors}, shard_size)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    copy = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert expected.keys() == copy.keys()
    assert all(torch.equal(copy[name], tensor) for name, tensor in expected.items())


def test_broken_promises_are_our_own_errors(tmp_path: Path) -> None:
    plan = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    with pytest.raises(AssertionError, match="b came where a was planned"):
        ShardWriter(tmp_path, plan, 100).write("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="planned"):
        ShardWriter(tmp_path, plan, 100).write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="planned"):
        ShardWriter(tmp_path, plan, 100).write("a", torch.zeros(2, dtype=torch.float16))
    assert not list(tmp_path.iterdir())
    writer = ShardWriter(tmp_path, plan, 100)
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"never written: \['b'\]"):
        writer.close()


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.bool, torch.bfloat16, torch.float32, torch.int64]),
        min_size=6,
        max_size=6,
    ),
)
def test_one_file_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    tensors = {
        f"tensor.{i}": torch.randint(0, 2, shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    path.write_bytes(b"".join(file_parts(tensors, {"b": "1", "a": "é"})))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": "é", "b": "1"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype is tensor.dtype and found.equal(tensor)
