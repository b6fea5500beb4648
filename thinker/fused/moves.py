"""Rows brought into the orders that products want: of bfloat16 on the right pairs of rows interleaved, or columns.

All turning is one transposition of 32-bit words, of float32 or of pairs of bfloat16. Sizes are multiples of 16, those
of bfloat16 of 32.
"""

# W columns

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..compiled.memory import pointer, shorts, words
from ..compiled.vectors import INT, LANES, SHORT, WORD, WORDS, load, loop, same, store


@njit(error_model="numpy")
def padded_rows(source, step, count, size, W, to):  # type: ignore[no-untyped-def]
    """Copy so many rows of W pieces of two bytes, `step` pieces apart, one behind the other, and zeros up to `size`."""
    target = shorts(to, 0, size * W)
    for row in range(count):
        values = shorts(source, row * step, W)
        for i in range(W):
            target[row * W + i] = values[i]
    for i in range(count * W, size * W):
        target[i] = 0


@njit(error_model="numpy")
def interleave(rows, step, size, W, to):  # type: ignore[no-untyped-def]
    """(size, W), `step` elements apart, to (size / 2, W, 2): each pair of rows side by side."""
    for pair in range(size // 2):
        first, second = shorts(rows, 2 * pair * step, W), shorts(rows, (2 * pair + 1) * step, W)
        target = words(to, pair * W, W)
        for i in range(W):
            target[i] = (np.int32(first[i]) & 0xFFFF) | (np.int32(second[i]) << 16)


@njit(error_model="numpy")
def side_by_side(rows, step, size, W, to):  # type: ignore[no-untyped-def]
    """(size, W) of float32, `step` elements apart, one row behind the other."""
    padded_rows(rows, 2 * step, size, size, 2 * W, to)


@intrinsic
def transpose(typing, source, step, rows, columns, to, to_step):  # type: ignore[no-untyped-def]
    """(rows, columns) words to (columns, rows), multiples of 16; addresses, and bytes from row to row."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, step, rows, columns, to, to_step = arguments

        def place(address, step, row, column):  # type: ignore[no-untyped-def]
            return pointer(builder, builder.add(address, builder.mul(row, step)), WORD, column)

        def down(i, _):  # type: ignore[no-untyped-def]
            def along(j, _):  # type: ignore[no-untyped-def]
                lines = [load(builder, place(source, step, builder.add(i, INT(row)), j)) for row in range(LANES)]
                for column, line in enumerate(across(builder, lines)):
                    store(builder, line, place(to, to_step, builder.add(j, INT(column)), i))
                return []

            loop(builder, INT(0), columns, LANES, [], along)
            return []

        loop(builder, INT(0), rows, LANES, [], down)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _packing(turned: bool) -> Any:
    @intrinsic
    def pack(typing, rows, step, count, to, to_step):  # type: ignore[no-untyped-def]
        """32 rows of bfloat16, `step` bytes apart, to `count` tiles of sixteen columns, `to_step` bytes apart.

        A tile has a pair of rows, or if turned a column, in each of its sixteen lines.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            rows, step, count, to, to_step = arguments

            def tile(i, _):  # type: ignore[no-untyped-def]
                column = builder.mul(i, INT(LANES))

                def row(number):  # type: ignore[no-untyped-def]
                    address = builder.add(rows, builder.mul(step, INT(number)))
                    return builder.zext(load(builder, pointer(builder, address, SHORT, column)), WORDS)

                lines = [
                    builder.or_(row(2 * pair), builder.shl(row(2 * pair + 1), same(WORDS, 16))) for pair in range(LANES)
                ]
                lines = across(builder, lines) if turned else lines
                for number, line in enumerate(lines):
                    place = builder.add(to, builder.mul(i, to_step))
                    store(builder, line, pointer(builder, place, WORD, INT(number * LANES)))
                return []

            loop(builder, INT(0), count, 1, [], tile)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return pack


pack, pack_turned = _packing(turned=False), _packing(turned=True)


def across(builder: ir.IRBuilder, lines: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square of sixteen rows."""
    distance = 1
    while distance < LANES:
        lines = exchanged(builder, lines, distance)
        distance *= 2
    return lines


def exchanged(builder: ir.IRBuilder, lines: list[ir.Value], distance: int) -> list[ir.Value]:
    """Rows so far apart exchange the lanes that are as far on the wrong side of a square's diagonal."""
    kept = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
    given = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
    results = list(lines)
    for row in range(LANES):
        if not row & distance:
            pair = lines[row], lines[row + distance]
            results[row] = builder.shuffle_vector(*pair, ir.Constant(WORDS, kept))
            results[row + distance] = builder.shuffle_vector(*pair, ir.Constant(WORDS, given))
    return results
