import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_vtrans.errors import UserError
from llm_vtrans.loading.checkpoint import DTYPES, Checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern, NaNs included; only 0 and 1 for bool, whose other bytes are undefined."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape, dtype=torch.int64).prod()) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"a": random_tensor((4, 3), torch.float32), "b": random_tensor((5,), torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    weight_map = {"a": SHARDS[0], "b": SHARDS[1]}
    for name, file_name in weight_map.items():
        save_file({name: random_tensor((2, 2), torch.float16)}, tmp_path / file_name)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(specs=specs, data=st.data())
def test_reads_what_safetensors_reads(
    tmp_path: Path, specs: list[tuple[tuple[int, ...], str]], data: st.DataObject
) -> None:
    tensors = {
        f"t{i}": random_tensor(shape, DTYPES[dtype], i) for i, (shape, dtype) in enumerate(specs)
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    loaded = load_file(path)
    assert checkpoint.tensors.keys() == loaded.keys()
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, expected in loaded.items():
        assert same_bits(checkpoint.read(name), expected)
        if expected.ndim:
            start = data.draw(st.integers(0, expected.shape[0]))
            stop = data.draw(st.integers(start, expected.shape[0]))
            rows = checkpoint.read_rows(name, start, stop)
            assert same_bits(rows, expected[start:stop])


def test_reference_checkpoint(shared: Path) -> None:
    checkpoint = Checkpoint.open(shared / "models" / "ref-llama")
    assert checkpoint.config["model_type"] == "llama"
    with safe_open(checkpoint.folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert set(names) == checkpoint.tensors.keys()
        for name in names:
            assert same_bits(checkpoint.read(name), file.get_tensor(name))


def test_tensors_have_memory_of_their_own(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    before = checkpoint.read("a")
    (single / "model.safetensors").write_bytes(b"")
    assert before.untyped_storage().nbytes() == checkpoint.tensors["a"].num_bytes
    before.zero_()
    with pytest.raises(UserError, match="ends 48 bytes early.*changed"):
        checkpoint.read("a")


def test_shards_of_the_hub_cache_are_links(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in sharded.iterdir() if p.is_file())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(i)))
    checkpoint = Checkpoint.open(snapshot)
    assert [info.file.name for info in checkpoint.tensors.values()] == list(SHARDS)
    assert checkpoint.read("b").shape == (2, 2)


def test_single_file_goes_before_an_index(sharded: Path) -> None:
    save_file({"c": torch.zeros(1)}, sharded / "model.safetensors")
    assert list(Checkpoint.open(sharded).tensors) == ["c"]


def test_sha256_names_the_content_not_the_sharding(single: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single)
    digest = checkpoint.sha256
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    weight_map = dict(zip(tensors, SHARDS, strict=True))
    for name, file_name in weight_map.items():
        save_file({name: tensors[name]}, single / file_name)
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(single).sha256 == digest

    save_file({"b": -tensors["b"]}, single / weight_map["b"])
    assert Checkpoint.open(single).sha256 != digest


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder.*hf download"):
        Checkpoint.open(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file.*save_pretrained"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be a JSON object"),
    ],
)
def test_bad_config(single: Path, content: str | None, message: str) -> None:
    (single / "config.json").unlink()
    if content is not None:
        (single / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("pytorch_model.bin", r"only pickles \(pytorch_model.bin\).*from_pretrained"),
        ("weights.pt", "only pickles"),
        ("adapter_model.safetensors", "adapter_model.safetensors but no model.safetensors.index"),
        ("readme.txt", "neither model.safetensors nor"),
    ],
)
def test_no_weights(single: Path, file_name: str, message: str) -> None:
    (single / "model.safetensors").rename(single / file_name)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not JSON"),
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": SHARDS[0], "b": "gone.safetensors"}}, "'gone.safetensors', which is"),
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' .of a. is not the plain"),
        ({"weight_map": {"a": "/x.safetensors"}}, "not the plain name"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, "not the plain name"),
        ({"weight_map": {"a": ".."}}, "not the plain name"),
        ({"weight_map": {"a": 7}}, "7 .of a. is not the plain name"),
        ({"weight_map": {"a": "config.json"}}, "not the plain name"),
        ({"weight_map": {"b": SHARDS[0]}}, f"puts b in {SHARDS[0]}, which does not hold it"),
        ({"weight_map": {"a": SHARDS[1], "b": SHARDS[0]}}, "puts a in .*does not hold it"),
    ],
)
def test_bad_index(sharded: Path, index: Any, message: str) -> None:
    (sharded / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError, match=f"{INDEX}: .*{message}"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, sharded / SHARDS[1])
    with pytest.raises(UserError, match=f"{SHARDS[1]}: tensor a is also in {SHARDS[0]}"):
        Checkpoint.open(sharded)


def cut(num_bytes: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size - num_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: Any, num_bytes: int = 8) -> Callable[[Path], None]:
    return lambda path: write_raw(path, header, bytes(num_bytes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(1), "has .* bytes, its header says .*: it is truncated"),
        (lambda path: os.truncate(path, 20), "of a file of 20.*truncated"),
        (lambda path: path.write_bytes(b"abc"), "of a file of 3"),
        (lambda path: path.write_bytes(b"\xff" * 64), f"header would be {2**64 - 1} bytes"),
        (lambda path: path.write_text("<html>not found</html>"), "header would be"),
        (raw(b"{not json}"), "header is not JSON"),
        (raw(b"\xff\xfe{}"), "header is not JSON"),
        (raw(b"[" * 100_000), "header is not JSON"),
        (raw([]), "header must be a JSON object"),
        (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' twice"),
        (raw({"a": 1}), "tensor a has shape None"),
        (raw({"a": entry(shape=[-2])}), r"tensor a has shape \[-2\]"),
        (raw({"a": entry(shape=[True])}), r"tensor a has shape \[True\]"),
        (raw({"a": entry(offsets=[8])}), r"data_offsets \[8\]"),
        (raw({"a": entry(dtype="F4")}), "dtype 'F4'; known are F64"),
        (raw({"a": entry(dtype=["F32"])}), "dtype .*; known are"),
        (raw({"a": entry(shape=[3])}), "takes 12 bytes, its data_offsets .* hold 8"),
        (raw({"a": entry(offsets=[8, 0])}), "hold -8"),
        (raw({"a": entry(), "b": entry(offsets=[8, 16])}), "truncated"),
        (raw({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "overlap at byte 4"),
        (raw({"a": entry(offsets=[4, 12])}, 12), "leave a hole at byte 0"),
        (raw({"a": entry()}, 9), "followed by other bytes"),
    ],
)
def test_damaged_shard(single: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(single / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: .*{message}") as caught:
        Checkpoint.open(single)
    assert "\n" not in str(caught.value)


def test_header_over_the_limit(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)  # sparse
    with pytest.raises(UserError, match="header would be 100000001 bytes"):
        Checkpoint.open(single)


def test_shard_that_is_a_folder(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        Checkpoint.open(single)
