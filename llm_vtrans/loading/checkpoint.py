"""Read-only view of a local checkpoint: headers are read at once, tensors one at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header and the
tensors' bytes. The header is parsed here, so that one tensor, or some of its rows,
can be read into its own memory: mapped pages of a whole shard would count as resident
memory, and they stay as long as anything refers to the mapping.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from llm_vtrans.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA_KEY = "__metadata__"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

CPU = torch.device("cpu")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_SIZE = 2**63 - 1  # of a dimension, and of a tensor's bytes
_MAX_DIMS = 64
_SAMPLE_BYTES = 4096
_DOWNLOAD_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shape: the tensor's shape, `()` for a scalar.
        dtype: its element type.
        file: the safetensors file that holds it.
        num_bytes: its size in bytes.
        offset: position of its first byte in `file`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    num_bytes: int
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """A validated local folder of safetensors.

    Attributes:
        folder: the checkpoint's folder.
        config: its parsed `config.json`.
        tensors: every tensor of every shard, by name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read and check `config.json`, the index and the shards' headers, no tensor data.

        As in transformers, `model.safetensors` goes before an index.

        Raises:
            UserError: something is missing, damaged, contradictory or a pickle.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; the model must be a local checkpoint folder "
                "(a model of the hub is fetched by `hf download NAME --local-dir FOLDER`)."
            )
        _check_links(folder)
        config = _read_json_object(folder / "config.json")
        if os.path.lexists(folder / SINGLE_FILE):
            return cls(folder, config, _read_header(folder / SINGLE_FILE))
        if not (folder / INDEX_FILE).exists():
            raise UserError(_no_weights_message(folder))
        return cls(folder, config, _read_sharded(folder))

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """The same files with tensors under other names (new -> old)."""
        return replace(self, tensors={new: self.tensors[old] for new, old in names.items()})

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The whole tensor, in memory of its own on a device.

        Raises:
            KeyError: the checkpoint has no such tensor.
            UserError: the file has been changed or cannot be read.
        """
        info = self.tensors[name]
        return _read_bytes(info, 0, info.num_bytes, device).view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of dimension 0; only their bytes are read.

        Returns:
            A tensor of shape `(stop - start, *shape[1:])` in memory of its own on the CPU.

        Raises:
            KeyError: the checkpoint has no such tensor.
            UserError: the file has been changed or cannot be read.
        """
        info = self.tensors[name]
        assert info.shape and 0 <= start <= stop <= info.shape[0], (name, info.shape, start, stop)
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        data = _read_bytes(info, start * row_bytes, stop * row_bytes)
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Identity of the checkpoint in hexadecimal, without reading all of it.

        Covers `config.json`, every name, shape and dtype, and the first 4 KiB of every
        tensor (fine-tuned siblings share all the rest); how it is sharded does not matter.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, info in sorted(self.tensors.items()):
            line = f"\n{name} {info.dtype} {info.shape}\n"
            digest.update(line.encode(errors="surrogatepass"))
            sample = _read_bytes(info, 0, min(info.num_bytes, _SAMPLE_BYTES))
            digest.update(sample.numpy().data)
        return digest.hexdigest()


def _read_bytes(info: TensorInfo, start: int, stop: int, device: torch.device = CPU) -> Tensor:
    """Bytes `[start, stop)` of a tensor as uint8; the file is closed again."""
    # Memory that a GPU copies from at full speed; torch keeps it for the next tensor.
    data = torch.empty(stop - start, dtype=torch.uint8, pin_memory=device.type == "cuda")
    try:
        with info.file.open("rb") as file:
            file.seek(info.offset + start)
            count = file.readinto(data.numpy().data)
    except OSError as error:
        raise UserError(f"{info.file}: cannot be read ({error.strerror}).") from error
    if count != stop - start:
        raise UserError(
            f"{info.file}: ends {stop - start - count} bytes early, so it has changed since the "
            f"start of the run; {_DOWNLOAD_AGAIN}."
        )
    return data.to(device)


def _check_links(folder: Path) -> None:
    """No file may be a link that leads away: what it leads to would be read, copied, published.

    The hub's cache alone consists of links, from `snapshots/REVISION` to `blobs`.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for path in folder.iterdir():
        if path.is_symlink() and not any(map(path.resolve().is_relative_to, allowed)):
            raise UserError(
                f"{path}: is a link that leads out of the checkpoint; put the file itself there."
            )


def _check_file(path: Path, most_bytes: int | None = None) -> None:
    """A pipe or a device would be read for ever, a text of any size into memory."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be read, it is no regular file; {_DOWNLOAD_AGAIN}.")
    if most_bytes is not None and path.exists() and path.stat().st_size > most_bytes:
        raise UserError(f"{path}: is larger than {most_bytes:,} bytes; {_DOWNLOAD_AGAIN}.")


def _read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold one object."""
    _check_file(path, _MAX_HEADER_BYTES)
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; name the folder that `save_pretrained` has written."
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {_DOWNLOAD_AGAIN}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object; {_DOWNLOAD_AGAIN}.")
    return value


def _refuse_constant(name: str) -> float:
    """JSON knows no NaN, and no config of a usable model does."""
    raise ValueError(f"it holds {name}")


def _no_weights_message(folder: Path) -> str:
    """What to do about a folder with neither `model.safetensors` nor an index."""
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: holds only pickles ({pickles[0]}), which can run code and are not "
            "loaded; convert a checkpoint you trust by "
            "`AutoModelForCausalLM.from_pretrained(x).save_pretrained(y)`."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{folder}: has {others[0]} but no {INDEX_FILE}; {_DOWNLOAD_AGAIN}."
    return f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; {_DOWNLOAD_AGAIN}."


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of all shards, checked against the index."""
    weight_map = _read_weight_map(folder / INDEX_FILE)
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, info in _read_header(folder / file_name).items():
            if name in tensors:
                raise UserError(
                    f"{info.file}: tensor {name} is also in {tensors[name].file.name}; "
                    f"{_DOWNLOAD_AGAIN}."
                )
            tensors[name] = info
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(
                f"{folder / INDEX_FILE}: puts {name} in {file_name}, which does not hold it; "
                f"{_DOWNLOAD_AGAIN}."
            )
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index: tensor name to the name of a safetensors file in the same folder."""
    weight_map = _read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map; {_DOWNLOAD_AGAIN}.")
    for name, file_name in weight_map.items():
        # A file may itself be a link (as in the hub's cache), but its name may not lead away.
        if (
            not isinstance(file_name, str)
            or "/" in file_name
            or "\\" in file_name
            or not file_name.endswith(".safetensors")
        ):
            raise UserError(
                f"{path}: {_shown(file_name)} (of {name}) is not the plain name of a safetensors "
                f"file in this folder; {_DOWNLOAD_AGAIN}."
            )
        if not (path.parent / file_name).is_file():
            raise UserError(
                f"{path}: names {file_name!r}, which is not in the folder; {_DOWNLOAD_AGAIN}."
            )
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file; the whole layout is checked, the data not read."""
    _check_file(path)
    try:
        with path.open("rb") as file:
            file_size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            data_start = 8 + length
            if length > _MAX_HEADER_BYTES or data_start > file_size:
                raise UserError(
                    f"{path}: its header would be {length} bytes of a file of {file_size}: not "
                    f"a safetensors file, or a truncated one; {_DOWNLOAD_AGAIN}."
                )
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    entries = _parse_header(path, raw)
    tensors = {name: _tensor_info(path, data_start, name, entries[name]) for name in entries}
    _check_layout(path, tensors, data_start, file_size)
    return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object without its metadata; a repeated name is refused."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise UserError(f"{path}: its header has {key!r} twice; {_DOWNLOAD_AGAIN}.")
            result[key] = value
        return result

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not JSON ({error}); {_DOWNLOAD_AGAIN}.") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header must be a JSON object; {_DOWNLOAD_AGAIN}.")
    header.pop(METADATA_KEY, None)
    return header


def _tensor_info(path: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    """Check one entry of a header: known dtype, offsets that fit shape and dtype."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(
            f"{path}: tensor {name} has shape {_shown(shape)} and data_offsets "
            f"{_shown(offsets)}, which must be lists of sizes; {_DOWNLOAD_AGAIN}."
        )
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name} has dtype {_shown(fields.get('dtype'))}; known are "
            f"{', '.join(DTYPES)}: save the checkpoint in one of them."
        )
    begin, end = offsets
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > _MAX_SIZE:
        raise UserError(
            f"{path}: tensor {name} of shape {shape} fits no memory; {_DOWNLOAD_AGAIN}."
        )
    if end - begin != num_bytes:
        raise UserError(
            f"{path}: tensor {name} of shape {shape} and dtype {fields['dtype']} takes "
            f"{num_bytes} bytes, its data_offsets {offsets} hold {end - begin}; {_DOWNLOAD_AGAIN}."
        )
    return TensorInfo(tuple(shape), dtype, path, num_bytes, data_start + begin)


def _shown(value: Any) -> str:
    """A JSON value as an error shows it, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a short list of sizes that a 64-bit machine knows."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)
    )


def _check_layout(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, file_size: int
) -> None:
    """The tensors must fill the data part: no overlap, no hole, nothing past the end."""
    spans = sorted((info.offset, info.offset + info.num_bytes) for info in tensors.values())
    end = max((stop for _, stop in spans), default=data_start)
    if end != file_size:
        what = "truncated" if end > file_size else "followed by other bytes"
        raise UserError(
            f"{path}: has {file_size} bytes, its header says {end}: it is {what}; "
            f"{_DOWNLOAD_AGAIN}."
        )
    for (_, stop), (start, _) in pairwise([(data_start, data_start), *spans]):
        if start != stop:
            what = "overlap" if start < stop else "leave a hole"
            raise UserError(
                f"{path}: data_offsets {what} at byte {min(start, stop) - data_start} of the "
                f"data; {_DOWNLOAD_AGAIN}."
            )
