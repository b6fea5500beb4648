"""The compiled half of `products.py`, as BLIS has it (doi 10.1145/2764454).

Of the right side some inputs of some columns, a slab, are brought into panels; then rows of the left, a piece at a
time, are brought into order too, and meet panel after panel, a few rows by a panel's columns added up in registers.
Portions of a slab and pieces are units of work, which threads take one after another: one that is held up takes fewer.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic

from ..compiled.atomics import add, await_value
from ..compiled.memory import floats, pointer, view_of
from ..compiled.vectors import BYTE, FLOAT, FLOATS, INT, LANES, WORD, fetch, fma, load, loop, same, spread, store
from .kernels import LINE
from .moves import transpose
from .products import BEGUN, DEPTH, DONE, HEIGHT, PANEL, PORTION, ROWS, TASK

TURN = 4  # inputs at once

tasks = view_of(from_dtype(TASK))


def multiply(address, part):  # type: ignore[no-untyped-def]
    """As one of some threads: take units of work until there are none left."""
    t = tasks(address, 0, 1)[0]
    own = t.scratch + part * t.step_scratch
    portions, pieces, lengths = -(-t.width // PORTION), -(-t.rows // t.piece), -(-t.inputs // t.length)
    units = portions + pieces  # of a slab
    count = -(-t.columns // t.width) * lengths * units
    unit = add(address, BEGUN, 1)
    while unit < count:
        slab, turn = unit // units, unit % units
        column, first = slab // lengths * t.width, slab % lengths * t.length
        width, length = min(t.width, t.columns - column), min(t.length, t.inputs - first)
        if turn < portions:
            await_value(address, DONE, unit - turn)  # all that use the slab before
            begin = turn * PORTION
            for i in range(begin, min(begin + PORTION, width), PANEL):
                pack_right(t, first, length, column + i, t.panels + 4 * i * length)
        else:
            await_value(address, DONE, unit - turn + portions)  # the slab
            row = (turn - portions) * t.piece
            add_rows(t, row, min(t.piece, t.rows - row), first, length, column, width, own)
        add(address, DONE, 1)
        unit = add(address, BEGUN, 1)
    return 0


@njit(error_model="numpy")
def add_rows(t, top, rows, first, length, left, width, own):  # type: ignore[no-untyped-def]
    """So many rows of the result from `top` on, a slab's inputs and columns of them."""
    beside = own + 4 * ROWS * DEPTH
    for k in range(0, length, DEPTH):
        depth, adds = min(DEPTH, length - k), first + k > 0
        for row in range(0, rows, HEIGHT):
            pack_left(t, top + row, min(HEIGHT, rows - row), first + k, depth, own + 4 * row * depth)
        for column in range(0, width, PANEL):
            panel, columns = t.panels + 4 * (column * length + k * PANEL), min(PANEL, width - column)
            for row in range(0, rows, HEIGHT):
                block, y = own + 4 * row * depth, t.result + 4 * ((top + row) * t.columns + left + column)
                if row + HEIGHT <= rows and columns == PANEL:
                    tile(block, panel, depth, y, 4 * t.columns, adds)
                else:
                    tile(block, panel, depth, beside, 4 * PANEL, False)
                    for i in range(min(HEIGHT, rows - row)):
                        source, target = floats(beside, i * PANEL, columns), floats(y, i * t.columns, columns)
                        for j in range(columns):
                            target[j] = target[j] + source[j] if adds else source[j]


@njit(error_model="numpy")
def pack_right(t, first, length, column, to):  # type: ignore[no-untyped-def]
    """(length, PANEL): so many inputs of columns from this one on, zeros for those that there aren't."""
    right, columns = t.right + 4 * (first * t.right_row + column * t.right_column), min(PANEL, t.columns - column)
    done = 0
    if columns == PANEL and t.right_column == 1:
        copy(right, 4 * t.right_row, length, to)
        done = length
    elif columns == PANEL and t.right_row == 1:
        done = length // LANES * LANES
        transpose(right, 4 * t.right_column, PANEL, done, to, 4 * PANEL)
    for k in range(done, length):
        line = floats(to, k * PANEL, PANEL)
        for i in range(PANEL):
            line[i] = floats(right, k * t.right_row + i * t.right_column, 1)[0] if i < columns else 0


@njit(error_model="numpy")
def pack_left(t, row, rows, first, depth, to):  # type: ignore[no-untyped-def]
    """(depth, HEIGHT): so many inputs of rows from this one on, zeros for those that there aren't."""
    left, done = t.left + 4 * (row * t.left_row + first * t.left_column), 0
    if rows == HEIGHT and t.left_column == 1:
        done = depth // TURN * TURN
        turn(left, 4 * t.left_row, done, to)
    elif rows == HEIGHT and t.left_row == 1:
        copy_few(left, 4 * t.left_column, depth, to)
        done = depth
    for k in range(done, depth):
        line = floats(to, k * HEIGHT, HEIGHT)
        for i in range(HEIGHT):
            line[i] = floats(left, k * t.left_column + i * t.left_row, 1)[0] if i < rows else 0


def _copying(*parts: int) -> Any:
    @intrinsic
    def copy(typing, source, step, count, to):  # type: ignore[no-untyped-def]
        """So many lines, that many bytes apart, one behind the other. What stands next in them is asked for."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            source, step, count, to = arguments

            def one(i, _):  # type: ignore[no-untyped-def]
                line = pointer(builder, builder.add(source, builder.mul(i, step)), FLOAT)
                place = pointer(builder, to, FLOAT, builder.mul(i, INT(sum(parts))))
                fetch(builder, builder.bitcast(line, BYTE.as_pointer()), LINE)
                at = 0
                for lanes in parts:
                    value = load(builder, builder.gep(line, [INT(at)]), lanes)
                    store(builder, value, builder.gep(place, [INT(at)]))
                    at += lanes
                return []

            loop(builder, INT(0), count, 1, [], one)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return copy


copy, copy_few = _copying(PANEL), _copying(4, HEIGHT - 4)


@intrinsic
def turn(typing, rows, step, depth, to):  # type: ignore[no-untyped-def]
    """HEIGHT rows, so many bytes apart, to (depth, HEIGHT); depth a multiple of TURN."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, step, depth, to = arguments
        starts = [builder.add(rows, builder.mul(step, INT(row))) for row in range(HEIGHT)]

        def mixed(a, b, lanes):  # type: ignore[no-untyped-def]
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(lanes)), lanes))

        def some(k, _):  # type: ignore[no-untyped-def]
            lines = [load(builder, pointer(builder, start, FLOAT, k), TURN) for start in starts]
            place = pointer(builder, to, FLOAT, builder.mul(k, INT(HEIGHT)))
            for half, lanes in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                # Two inputs of each pair of rows.
                first, second, third = (mixed(lines[row], lines[row + 1], lanes) for row in range(0, HEIGHT, 2))
                for i, (four, two) in enumerate((((0, 1, 4, 5), (0, 1)), ((2, 3, 6, 7), (2, 3)))):
                    at = (2 * half + i) * HEIGHT
                    store(builder, mixed(first, second, four), builder.gep(place, [INT(at)]))
                    store(builder, mixed(third, third, two), builder.gep(place, [INT(at + 4)]))
            return []

        loop(builder, INT(0), depth, TURN, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def tile(typing, block, panel, depth, y, step, adds):  # type: ignore[no-untyped-def]
    """block (depth, HEIGHT), transposed, times panel (depth, PANEL): rows of y, bytes apart, or added to them."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        block, panel, depth, y, step, adds = arguments
        lines = [pointer(builder, builder.add(y, builder.mul(step, INT(row))), FLOAT) for row in range(HEIGHT)]
        for line in lines:
            fetch(builder, builder.bitcast(line, BYTE.as_pointer()), 0)

        def inputs(count):  # type: ignore[no-untyped-def]
            def some(k, sums):  # type: ignore[no-untyped-def]
                left = pointer(builder, block, FLOAT, builder.mul(k, INT(HEIGHT)))
                right = pointer(builder, panel, FLOAT, builder.mul(k, INT(PANEL)))
                for i in range(count):
                    line = load(builder, builder.gep(right, [INT(i * PANEL)]))
                    column = [builder.load(builder.gep(left, [INT(i * HEIGHT + row)])) for row in range(HEIGHT)]
                    sums = [fma(builder, spread(builder, x), line, y) for x, y in zip(column, sums, strict=True)]
                return sums

            return some

        whole = builder.and_(depth, INT(-TURN))
        sums = loop(builder, INT(0), whole, TURN, [same(FLOATS, 0.0)] * HEIGHT, inputs(TURN))
        sums = loop(builder, whole, depth, 1, sums, inputs(1))
        for line, total in zip(lines, sums, strict=True):
            before = builder.select(adds, load(builder, line), same(FLOATS, 0.0))
            store(builder, builder.fadd(total, before), line)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.boolean), generate
