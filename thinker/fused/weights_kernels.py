"""The compiled half of `weights.py`: a thread has some rows or columns of the gradient, and adds all tokens to them.

It does so for a block of the gradient after another, which stays in its core's own cache together with what the block
needs of some tokens, brought into the order of tiles.
"""

from __future__ import annotations

from numba import from_dtype, njit

from ..compiled.memory import floats, integers, view_of
from ..compiled.shares import share
from .kernels import STEP
from .moves import pack, pack_turned
from .tiles import TILE_BYTES, TILE_ROWS, leave_tiles, multiply_packed, take_tiles
from .weights import COLUMNS, ROWS, TASK, TOKENS

TILE = TILE_ROWS * TILE_BYTES
PANEL = TOKENS // STEP * TILE  # bytes of sixteen rows or columns

tasks = view_of(from_dtype(TASK))


def add_products(address, part):  # type: ignore[no-untyped-def]
    """A part of a task, of as many as there are threads."""
    t = tasks(address, 0, 1)[0]
    top, bottom, left, right = 0, t.outputs // STEP, 0, t.inputs // STEP
    if t.outputs >= t.inputs:
        top, bottom = share(part, t.parts, bottom)
    else:
        left, right = share(part, t.parts, right)
    ends, begin = integers(t.ends, 0, t.groups), 0
    take_tiles()
    for group in range(t.groups):
        for m in range(top * STEP, bottom * STEP, ROWS):
            for k in range(left * STEP, right * STEP, COLUMNS):
                rows, columns = min(ROWS, bottom * STEP - m), min(COLUMNS, right * STEP - k)
                grad = t.grad + 4 * ((group * t.outputs + m) * t.inputs + k)
                add_block(t, t.scratch + part * t.step_scratch, begin, ends[group], m, rows, k, columns, grad)
        begin = ends[group]
    leave_tiles()
    return 0


@njit(error_model="numpy")
def add_block(t, own, begin, end, top, rows, left, columns, grad):  # type: ignore[no-untyped-def]
    """Tokens `begin` to `end` - 1 for so many rows and columns of the gradient, from these on."""
    if begin == end:
        for row in range(rows):
            nothing = floats(grad, row * t.inputs, columns)
            for i in range(columns):
                nothing[i] = 0
    right = own + rows // TILE_ROWS * PANEL
    for token in range(begin, end, TOKENS):
        count = min(TOKENS, end - token) // STEP
        for i in range(count):
            n = token + i * STEP
            pack_turned(t.y_grad + n * t.y_step + 2 * top, t.y_step, rows // TILE_ROWS, own + i * TILE, PANEL)
            pack(t.x + n * t.x_step + 2 * left, t.x_step, columns // TILE_ROWS, right + i * TILE, PANEL)
        for m in range(0, rows, STEP):
            for k in range(0, columns, STEP):
                multiply_packed(
                    own + m // TILE_ROWS * PANEL, right + k // TILE_ROWS * PANEL, PANEL, count * TILE,
                    grad + 4 * (m * t.inputs + k), 4 * t.inputs, token > begin,
                )  # fmt: skip
