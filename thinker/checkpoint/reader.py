"""Tensors from safetensors files, memory-mapped and read strictly; nothing in here imports torch or runs foreign code.

A header is believed only when every length, offset, shape and type in it fits the file exactly, so that a truncated or
tampered file gives one line. What the names mean lives in `formats/`, writing in `writer.py`.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from .files import parse_json, read_json

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
HEADER_LIMIT = 100_000_000  # bytes; the format's own bound
MAX_DIMS = 8
MAX_SIZE = 2**48  # more than any address reaches
CHUNK = 1 << 20  # values looked at together


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file: read-only arrays over a memory map, bfloat16 as `ml_dtypes.bfloat16`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                if size < 8:
                    raise ValueError(f"{path}: {size} bytes are no safetensors file, which has at least 8")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        self.metadata, self._entries = _read_header(self._map, size, str(path))

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            array = np.empty(entry.shape, entry.dtype)
        else:
            array = np.frombuffer(self._map, entry.dtype, count, entry.start).reshape(entry.shape)
        if not array.flags.aligned:  # compiled code and torch want aligned data
            array = array.copy()
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without looking at its values."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of one tensor's values."""
        return self._entries[name].dtype


class ShardedSafetensors(Mapping[str, np.ndarray]):
    """The tensors of several files that `model.safetensors.index.json` joins. A missing shard is named."""

    def __init__(self, index: Path) -> None:
        self.path = index
        self.metadata: dict[str, str] = {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map that names the file of every tensor")
        self._files: dict[str, SafetensorsFile] = {}
        self._homes: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            # Only plain names: an index from elsewhere must not reach outside its folder.
            if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or "\0" in shard:
                raise ValueError(f"{index}: {shard!r} is no file name within the folder")
            if shard not in self._files:
                path = index.parent / shard
                if not path.is_file():
                    raise ValueError(f"{index}: the shard {shard!r} is missing; fetch it again into {index.parent}")
                self._files[shard] = read_safetensors(path)
            if name not in self._files[shard]:
                raise ValueError(f"{index}: tensor {name!r} should be in {shard!r} and isn't")
            self._homes[name] = self._files[shard]
        for shard, file in self._files.items():
            extra = [name for name in file if self._homes.get(name) is not file]
            if extra:
                raise ValueError(f"{index}: {shard!r} holds {extra[0]!r}, which the index doesn't place there")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._homes[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without looking at its values."""
        return self._homes[name].shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of one tensor's values."""
        return self._homes[name].dtype(name)


Weights = SafetensorsFile | ShardedSafetensors


def read_safetensors(path: str | Path) -> SafetensorsFile:
    """Open one file. Whatever doesn't fit in it raises a `ValueError` that names the file and the reason."""
    path = Path(path)
    refuse_pickle(path)
    return SafetensorsFile(path)


def read_weights(folder: Path) -> Weights:
    """Open a folder's `model.safetensors`, whole or sharded; a folder with pickle files only is refused."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return read_safetensors(whole)
    if index.exists():
        return ShardedSafetensors(index)
    for path in sorted(folder.iterdir()):
        refuse_pickle(path)
    raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")


def refuse_pickle(path: Path) -> None:
    """Raise `ValueError` for the names that pickle files go by."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path}: is a pickle file, which can run code when it is opened; "
            "convert it to safetensors with the program that wrote it (transformers: save_pretrained)"
        )


def widen(array: ArrayLike) -> np.ndarray:
    """The values as float32; float32 arrays come back as they are."""
    return np.asarray(array, np.float32)


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. Takes the same small memory whatever the size."""
    if array.size == 0 or array.dtype.kind in "biu":
        return True
    if array.dtype in (np.float32, np.float64):
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(array.min()) and np.isfinite(array.max()))  # either is NaN when any value is
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + CHUNK]).all() for start in range(0, flat.size, CHUNK))


def _read_header(data: mmap.mmap, size: int, where: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries, once everything has been checked against the size of the file."""
    length = int.from_bytes(data[:8], "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"{where}: its header claims {length} bytes, the file has {size - 8} after the length")
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its header is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.startswith("{"):
        raise ValueError(f"{where}: its header is no JSON object, so this is no safetensors file")
    header = parse_json(text, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: __metadata__ must map names to strings")

    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        entry, end = _read_entry(fields, f"{where}: tensor {name[:200]!r}", base=8 + length)
        entries[name] = entry
        spans.append((entry.start, end, name))
    place = 8 + length
    for start, end, name in sorted(spans):
        if start != place:
            problem = "overlaps another" if start < place else "leaves a hole before it"
            raise ValueError(f"{where}: tensor {name[:200]!r} {problem} (begins at byte {start}, expected {place})")
        place = end
    if place != size:
        raise ValueError(
            f"{where}: the header describes {place} bytes, the file has {size}: truncated or tampered with"
        )
    return metadata, entries


def _read_entry(fields: Any, where: str, base: int) -> tuple[Entry, int]:
    """One tensor's entry and the byte after its last, both counted from the beginning of the file."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise ValueError(f"{where} has type {str(dtype_name)[:40]!r}, which is none of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{where} has a shape that is no list of at most {MAX_DIMS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets that are no pair of positions")
    dtype = DTYPES[dtype_name]
    wanted, given = dtype.itemsize * math.prod(shape), offsets[1] - offsets[0]  # Python integers: nothing overflows
    if given != wanted:
        raise ValueError(f"{where} needs {wanted} bytes for {dtype_name} {shape}, its offsets give {given}")
    if wanted == 0 and math.prod(max(extent, 1) for extent in shape) >= MAX_SIZE:
        raise ValueError(f"{where} is empty and yet has the shape {shape}")
    return Entry(dtype, tuple(shape), base + offsets[0]), base + offsets[1]


def _is_sizes(values: Any) -> bool:
    """Whether this is a list of non-negative integers that fit an address; `true` is no integer."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)
