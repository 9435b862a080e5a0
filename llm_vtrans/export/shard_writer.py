"""Stream a sharded safetensors checkpoint to disk, one tensor in memory at a time."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm_vtrans.loading.checkpoint import DTYPES, INDEX_FILE, METADATA_KEY, SINGLE_FILE

TensorSpec = tuple[tuple[int, ...], torch.dtype]

FORMAT = {"format": "pt"}  # transformers refuses a file that does not name its framework
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes tensors in a planned order into shards that are named as in transformers.

    All shapes are known beforehand, so every header is written before its data and
    nothing is kept. No file stays open between two writes.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec], shard_size: int) -> None:
        """Plan the shards; nothing is written yet.

        Args:
            folder: an existing folder without a checkpoint.
            tensors: name to shape and dtype, in the order in which they will be written.
            shard_size: most bytes of tensors in a shard; a larger tensor has one to itself.
        """
        assert tensors and shard_size > 0 and METADATA_KEY not in tensors
        self._folder = folder
        self._specs = dict(tensors)
        self._shards = _plan_shards(self._specs, shard_size)
        self._pending = [
            (file_name, name) for file_name, names in self._shards.items() for name in names
        ][::-1]
        self._digests = {file_name: hashlib.sha256() for file_name in self._shards}

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next planned tensor, of the planned shape and dtype, from any device."""
        file_name, planned = self._pending.pop()
        assert name == planned, f"{name} came where {planned} was planned"
        found = (tuple(tensor.shape), tensor.dtype)
        assert found == self._specs[name], f"{name}: {found}, planned {self._specs[name]}"

        parts: list[bytes | memoryview] = [_bytes_of(tensor)]
        names = self._shards[file_name]
        if name == names[0]:
            parts.insert(0, _header({name: self._specs[name] for name in names}, FORMAT))
        self._append(file_name, parts, is_last=name == names[-1])

    def close(self) -> dict[str, str]:
        """Write the index, if there is more than one shard.

        Returns:
            File name to SHA-256 in hexadecimal, of every file that was written.
        """
        assert not self._pending, f"never written: {[name for _, name in self._pending][:3]}"
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(_num_bytes, self._specs.values()))},
                "weight_map": {
                    name: file_name for file_name, names in self._shards.items() for name in names
                },
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            self._digests[INDEX_FILE] = hashlib.sha256()
            self._append(INDEX_FILE, [text.encode()], is_last=True)
        return {file_name: digest.hexdigest() for file_name, digest in self._digests.items()}

    def _append(self, file_name: str, parts: Iterable[bytes | memoryview], is_last: bool) -> None:
        """Add bytes to a file and to its digest; the last ones bring the file to the disk."""
        with (self._folder / file_name).open("ab") as file:
            for part in parts:
                file.write(part)
                self._digests[file_name].update(part)
            if is_last:
                file.flush()
                os.fsync(file.fileno())


def file_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor after the other, none of which is copied.

    Args:
        tensors: from any device.
        metadata: of the header, in this order.
    """
    # Widest entries first, as the library does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    specs = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    yield _header(specs, metadata)
    yield from (_bytes_of(tensors[name]) for name in names)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _plan_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> dict[str, list[str]]:
    """File name to the names of its tensors: as many as fit, in the given order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _num_bytes(spec)
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a file's header, padded so that the data starts 8-byte aligned."""
    entries: dict[str, object] = {METADATA_KEY: metadata}
    begin = 0
    for name, (shape, dtype) in specs.items():
        end = begin + _num_bytes((shape, dtype))
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _num_bytes(spec: TensorSpec) -> int:
    """Size of a tensor in bytes."""
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize
