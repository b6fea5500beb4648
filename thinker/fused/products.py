"""Products of float32 matrices: for processors on which torch's library is the slower one."""

# N rows, M columns, K inputs

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiled.processor import LANES, NEGLECTED
from . import kernels
from .operations import operation

# Rows and columns of the result that are added up in registers, over so many inputs: of the right side that is half the
# nearest cache, of the left a fifth of a core's own, for so many rows at once.
HEIGHT, PANEL, DEPTH = 6, LANES, 256
ROWS = 16 * HEIGHT
# Columns of the right side, and their inputs, that are in order at once; and how many one thread brings into it.
WIDTH, LENGTH, PORTION = 4096, 4 * DEPTH, 4 * PANEL
# Sizes, and multiplications in all, from which it repays itself.
LEAST, WORK = 64, 1 << 27

_LEFT, _RIGHT = ("left", "left_row", "left_column"), ("right", "right_row", "right_column")
_FIELDS = "rows", "inputs", "columns", "piece", "width", "length", *_LEFT, *_RIGHT, "result", "panels"
_WORDS = *kernels.SHARED, *_FIELDS, "begun", "done"
TASK = np.dtype([(name, np.int64) for name in _WORDS])
BEGUN, DONE = (_WORDS.index(name) for name in ("begun", "done"))  # of how many units of work


def times(left: Tensor, right: Tensor) -> Tensor:
    """left (N, K) times right (K, M), without a gradient: (N, M)."""
    return product(left, right) if serves(left, right) else left @ right


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether left (…, K) and right (K, M) are multiplied here."""
    inputs, columns = right.shape
    return (
        NEGLECTED
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and left.shape[-1] == inputs
        and min(inputs, columns) >= LEAST
        and left.numel() >= LEAST * inputs
        and left.numel() * columns >= WORK
        and kernels.is_available(torch.float32)
    )


def _empty(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(len(left), right.shape[1])


@operation("product", _empty)
def product(left: Tensor, right: Tensor) -> Tensor:
    """left (N, K) times right (K, M), of float32: (N, M). Either may lie across the memory.

    Inputs are added up in their order, DEPTH of them at a time, whatever the sizes and however many the threads.
    """
    result = _empty(left, right)
    left, right = _in_lines(left), _in_lines(right)
    (rows, inputs), columns = left.shape, right.shape[1]
    width, length = min(WIDTH, -(-columns // PANEL) * PANEL), min(LENGTH, inputs)
    panels = left.new_empty(width * length)
    # At least two pieces for each thread, so that one that is held up can be left with less.
    pieces = max(-(-rows // ROWS), 2 * torch.get_num_threads())
    sizes = rows, inputs, columns, -(-rows // pieces // HEIGHT) * HEIGHT, width, length
    places = left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), result.data_ptr(), panels.data_ptr()
    fields = dict(zip(_FIELDS, (*sizes, *places), strict=True))
    kernels.perform(kernels.multiply, TASK, fields, 4 * (ROWS * DEPTH + HEIGHT * PANEL))
    return result


def _in_lines(x: Tensor) -> Tensor:
    """x, or a copy, so that its rows or its columns lie along the memory."""
    return x if 1 in x.stride() else x.contiguous()
