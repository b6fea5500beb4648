"""The container of GGUF: typed metadata and tensors, read strictly over a memory map.

Every count, length, offset and size is checked against the file before it is believed, so that a truncated or tampered
file gives one line and no allocation beyond its size. gguf-py decodes the blocks of quantised types; what the names
mean is in `gguf.py`, writing in `gguf_export.py`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from ..checkpoint.files import brief
from .q8 import BLOCK, Q8Tensor
from .tensors import Array, Shape

Value = bool | int | float | str | list[str] | np.ndarray

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
TYPES = (*_PLAIN, *(GGMLQuantizationType[name] for name in _BLOCKS))
MAX_DIMS = 4
MAX_SIZE = 2**48


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    kind: GGMLQuantizationType
    shape: Shape
    start: int
    nbytes: int


class GGUFFile:
    """Metadata by key, and tensors by name: floats as views of the file, Q8_0 as `Q8Tensor`, other blocks decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._size = file.seek(0, 2)
                if self._size < 24:
                    raise ValueError(f"{path}: {self._size} bytes are no GGUF file, which has at least 24")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        self._place = 0
        n_tensors, n_fields = self._read_preamble()
        self.fields = self._read_fields(n_fields)
        self.entries = self._read_entries(n_tensors)

    def tensor(self, name: str) -> Array:
        """One tensor, in the order of axes that numpy has: (out, in)."""
        entry = self.entries[name]
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.start)
        if entry.kind in _PLAIN:
            return raw.view(_PLAIN[entry.kind]).reshape(entry.shape)
        rows = raw.reshape(*entry.shape[:-1], -1)
        if entry.kind == GGMLQuantizationType.Q8_0:
            blocks = rows.reshape(*rows.shape[:-1], -1, 2 + BLOCK)
            scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
            return Q8Tensor(np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(entry.shape), scales)
        with np.errstate(all="ignore"):  # scales that are NaN or infinite are noticed in what comes out
            return dequantize(rows, entry.kind)

    def scalar(self, key: str) -> bool | int | float | str | None:
        """The value of a key that can't be an array, None where it is missing."""
        value = self.fields.get(key)
        if isinstance(value, list | np.ndarray):
            raise self.fail(f"{key[:80]} must be a single value")
        return value

    def fail(self, reason: str) -> ValueError:
        """An error that names the file."""
        return ValueError(f"{self.path}: {reason}")

    # Reading on from the current place

    def _take(self, count: int, what: str) -> int:
        """Move on by so many bytes, and return where they begin."""
        place = self._place
        if count > self._size - place:
            left = self._size - place
            raise self.fail(f"truncated or tampered with: {what} needs {count} bytes at {place}, {left} are left")
        self._place = place + count
        return place

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self._map, self._take(struct.calcsize(f"<{code}"), what))[0]

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        place = self._take(length, what)
        try:
            return self._map[place : place + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def _read_preamble(self) -> tuple[int, int]:
        if self._map[:4] != b"GGUF":
            raise self.fail("doesn't begin with GGUF, so it is no GGUF file")
        self._place = 4
        version = self._number("I", "the version")
        if version not in (2, 3):
            hint = " (it was written for a machine of the other byte order)" if version & 0xFFFF == 0 else ""
            raise self.fail(f"GGUF version {version} is not supported, only 2 and 3{hint}")
        n_tensors, n_fields = self._number("Q", "the counts"), self._number("Q", "the counts")
        # A tensor takes at least 32 bytes here, a field 13: larger counts can't be true.
        if n_tensors * 32 + n_fields * 13 > self._size:
            raise self.fail(f"claims {n_tensors} tensors and {n_fields} fields, too many for {self._size} bytes")
        return n_tensors, n_fields

    def _read_fields(self, count: int) -> dict[str, Value]:
        fields: dict[str, Value] = {}
        for _ in range(count):
            key = self._string("a key")
            if key in fields:
                raise self.fail(f"key {key[:80]!r} stands twice")
            fields[key] = self._read_value(self._number("I", "a type"), f"the value of {key[:80]!r}")
        return fields

    def _read_value(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self._string(what)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        kind, count = self._number("I", what), self._number("Q", what)
        if kind == _STRING:
            if count * 8 > self._size - self._place:
                raise self.fail(
                    f"{what} claims {count} strings, too many for the {self._size - self._place} bytes left"
                )
            return [self._string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"{what} is an array of type {kind}, which is not supported")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        place = self._take(count * dtype.itemsize, what)
        return np.frombuffer(self._map[place : self._place], dtype)

    def _read_entries(self, count: int) -> dict[str, Entry]:
        found: list[tuple[str, GGMLQuantizationType, Shape, int]] = []
        for _ in range(count):
            name = self._string("the name of a tensor")
            what = f"tensor {name[:80]!r}"
            n_dims = self._number("I", what)
            if not 1 <= n_dims <= MAX_DIMS:
                raise self.fail(f"{what} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible")
            shape = tuple(self._number("Q", what) for _ in range(n_dims))[::-1]
            number = self._number("I", what)
            kind = next((kind for kind in TYPES if kind == number), None)
            if kind is None:
                known = {int(kind): kind.name for kind in GGMLQuantizationType}
                names = ", ".join(kind.name for kind in TYPES)
                raise self.fail(f"{what} has type {known.get(number, number)}, which is not among {names}")
            found.append((name, kind, shape, self._number("Q", what)))

        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment {brief(alignment)} is no power of two from 8")
        base = _padded(self._place, alignment)
        entries: dict[str, Entry] = {}
        place = end = base
        for name, kind, shape, offset in found:
            what = f"tensor {name[:80]!r}"
            if name in entries:
                raise self.fail(f"{what} stands twice")
            values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
            size = math.prod(shape)  # Python integers: nothing overflows
            if not 0 < size < MAX_SIZE or shape[-1] % values_per_block:
                raise self.fail(f"{what} can't have the shape {list(shape)} in {kind.name}")
            if base + offset != place:
                raise self.fail(f"{what} begins at byte {base + offset}, expected {place}")
            nbytes = size // values_per_block * bytes_per_block
            entries[name] = Entry(kind, shape, place, nbytes)
            end = place + nbytes
            place = _padded(end, alignment)
        if not end <= self._size <= max(place, base):
            raise self.fail(f"truncated or tampered with: its tensors end at byte {end}, the file has {self._size}")
        return entries


def _padded(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
