"""Q8_0: blocks of 32 integers along the input and one float16 scale each, the numbers of llama.cpp's format.

The one 8-bit arithmetic of the project: files of that type are taken as they are, and everything else is rounded here.
What multiplies with it lives in `decode/native/`, the bytes of GGUF files in `gguf_file.py` and `gguf_export.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

BLOCK = 32
ROWS = 4096  # rows rounded together: bounds the memory for temporary copies


@dataclass(frozen=True)
class Q8Tensor:
    """value[..., c] = quants[..., c] * scales[..., c // 32], from int8 (..., cols) and float16 (..., cols / 32)."""

    quants: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        assert self.quants.dtype == np.int8, self.quants.dtype
        assert self.scales.dtype == np.float16, self.scales.dtype
        assert self.quants.shape == (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK), self.quants.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.quants.shape

    def __getitem__(self, index: Any) -> Q8Tensor:
        """Part of it; the index must leave the last axis, which holds the blocks, whole."""
        return Q8Tensor(self.quants[index], self.scales[index])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The values, for `np.asarray(tensor, np.float32)`, exactly: a product of 8 and 11 bits fits float32."""
        if copy is False:
            raise ValueError("the values of a Q8Tensor are computed: they can't be had without a copy")
        blocks = self.quants.reshape(*self.scales.shape, BLOCK).astype(np.float32)
        blocks *= self.scales.astype(np.float32)[..., None]
        return blocks.reshape(self.shape).astype(dtype or np.float32, copy=False)

    @classmethod
    def quantise(cls, array: np.ndarray) -> Q8Tensor:
        """Round an array (..., cols) of floats as ggml does: scale = max|x| / 127, half away from zero.

        Raises `ValueError` when 32 doesn't divide the columns, or a scale leaves float16.
        """
        if array.ndim == 0 or array.shape[-1] % BLOCK:
            width = array.shape[-1] if array.ndim else 0
            raise ValueError(f"rows of {width} values can't be cut into Q8_0's blocks of {BLOCK}")
        rows = array.reshape(-1, array.shape[-1])
        quants = np.empty(rows.shape, np.int8)
        scales = np.empty((rows.shape[0], rows.shape[1] // BLOCK), np.float16)
        for start in range(0, rows.shape[0], ROWS):
            part = slice(start, start + ROWS)
            blocks = rows[part].astype(np.float32).reshape(-1, BLOCK)
            wide = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
            if wide.max() > np.finfo(np.float16).max:
                raise ValueError(
                    f"values up to {wide.max() * 127:.6g} are too large for Q8_0, whose scales are float16"
                )
            # The unrounded float32 scale divides, its float16 form is stored; ggml does the same.
            usable = wide >= np.finfo(np.float32).tiny
            scaled = blocks * np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=usable)
            size = np.abs(scaled)
            whole = np.floor(size)
            whole += np.floor(2 * (size - whole))
            quants[part] = np.copysign(whole, scaled).reshape(quants[part].shape)
            scales[part] = wide.astype(np.float16).reshape(scales[part].shape)
        return cls(quants.reshape(array.shape), scales.reshape(*array.shape[:-1], -1))
