"""Tensors to safetensors files: atomically, one tensor in memory at a time, never with NaN or infinity in them.

The tensors may be a lazy mapping and may be cast on the way. Reading lives in `reader.py`, names in `formats/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from .files import replacing
from .reader import CHUNK, DTYPES, all_finite

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    dtype: np.dtype[Any] | None = None,
) -> None:
    """Replace `path` by these tensors, cast to `dtype` if given. NaN, infinity and overflow raise `ValueError`.

    Each tensor is asked for twice, once for its shape and once for its values, so that a lazy mapping need never hold
    two of them.
    """
    entries: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name in tensors:
        array = tensors[name]
        kind = array.dtype if dtype is None else dtype
        if kind not in _NAMES:
            raise ValueError(f"{path}: {name} has type {kind}, which safetensors files here don't hold")
        entries[name] = (kind, array.shape)
    # Wide types first, so that every tensor begins at a multiple of its own width.
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        kind, shape = entries[name]
        end = place + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)

    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_values(file, tensors[name], entries[name][0], f"{path}: {name}")


def _write_values(file: IO[bytes], array: np.ndarray, dtype: np.dtype[Any], where: str) -> None:
    if not all_finite(array):
        raise ValueError(f"{where} holds NaN or infinity and is not written; go back to an earlier checkpoint")
    if array.dtype == dtype:
        file.write(_bytes(array))
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        with np.errstate(over="ignore"):
            chunk = flat[start : start + CHUNK].astype(dtype)
        if not all_finite(chunk):
            largest = float(np.abs(flat[start : start + CHUNK].astype(np.float32)).max())
            raise ValueError(f"{where} reaches {largest:.6g}, beyond the range of {dtype}; choose bfloat16 or float32")
        file.write(_bytes(chunk))


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
