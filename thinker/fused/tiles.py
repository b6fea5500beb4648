"""Products of matrices as the processor's own instructions: of bfloat16 tiles where it has AMX, else pairs in vectors.

An operand on the left lies row by row; on the right float32 does too, and of bfloat16 pairs of rows lie interleaved, as
both instructions want them: (k / 2, n, 2). Sums are float32. Who packs what is the kernels' business.
"""

# m rows, n columns, k inputs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled.memory import pointer
from ..compiled.processor import TILES, WIDE
from ..compiled.vectors import BYTE, FLOAT, FLOATS, INT, LANES, WORD, fma, llvm, load, loop, same, spread, store
from .kernels import STEP
from .numbers import PAIRS

TILE_ROWS, TILE_BYTES = 16, 64

Join = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]  # sums, inputs, columns


def at(builder: ir.IRBuilder, address: ir.Value, *bytes_: ir.Value) -> ir.Value:
    """A pointer so many bytes further."""
    return pointer(builder, address, BYTE, *bytes_)


def _by_tiles(builder, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
    """Blocks of two by two tiles of sums."""
    lower = builder.mul(a_step, INT(TILE_ROWS))

    def block(i, j):  # type: ignore[no-untyped-def]
        from_a, from_b = at(builder, a, builder.mul(i, a_step)), at(builder, b, builder.mul(j, INT(4)))

        def operands(p):  # type: ignore[no-untyped-def]
            left = builder.gep(from_a, [builder.mul(p, INT(2))])
            right = builder.gep(from_b, [builder.mul(builder.sdiv(p, INT(2)), b_step)])
            return (left, builder.gep(left, [lower])), a_step, (right, builder.gep(right, [INT(TILE_BYTES)])), b_step

        to = at(builder, c, builder.mul(i, c_step), builder.mul(j, INT(4)))
        _add_tiles(builder, to, c_step, adds, k, STEP, operands)

    _for_each_block(builder, m, n, STEP, STEP, block)


def _add_tiles(builder, to, step, adds, end, by, operands):  # type: ignore[no-untyped-def]
    """Two by two tiles of sums, of the eight tiles that there are: of products of the operands at 0, `by`, … `end`."""
    below = builder.gep(to, [builder.mul(step, INT(TILE_ROWS))])
    corners = [builder.gep(place, [INT(right)]) for place in (to, below) for right in (0, TILE_BYTES)]

    def tile(what, number, address, step):  # type: ignore[no-untyped-def]
        llvm(builder, f"x86.tile{what}d64", ir.VoidType(), BYTE(number), address, step)

    with builder.if_else(adds) as (then, otherwise):
        with then:
            for number, corner in enumerate(corners):
                tile("load", number, corner, step)
        with otherwise:
            for number in range(4):
                llvm(builder, "x86.tilezero", ir.VoidType(), BYTE(number))

    def inward(p, _):  # type: ignore[no-untyped-def]
        left, left_step, right, right_step = operands(p)
        for half in range(2):
            tile("load", 4 + half, left[half], left_step)
            tile("load", 6 + half, right[half], right_step)
        for number in range(4):
            numbers = (BYTE(value) for value in (number, 4 + number // 2, 6 + number % 2))
            llvm(builder, "x86.tdpbf16ps", ir.VoidType(), *numbers)
        return []

    loop(builder, INT(0), end, by, [], inward)
    for number, corner in enumerate(corners):
        tile("store", number, corner, step)


def _in_registers(rows: int, parts: tuple[int, ...], together: int, join: Join) -> Any:
    """Blocks of so many rows by some vectors of sums, to which `join` adds so many inputs' products, a word of them."""

    def form(builder, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
        def block(i, j):  # type: ignore[no-untyped-def]
            from_a, from_b = at(builder, a, builder.mul(i, a_step)), at(builder, b, builder.mul(j, INT(4)))
            to = at(builder, c, builder.mul(i, c_step), builder.mul(j, INT(4)))
            lines = [
                builder.bitcast(builder.gep(to, [builder.mul(c_step, INT(i))]), FLOAT.as_pointer()) for i in range(rows)
            ]
            places = [builder.gep(line, [INT(part)]) for line in lines for part in parts]
            sums = [builder.select(adds, load(builder, place), same(FLOATS, 0.0)) for place in places]

            def inward(p, sums):  # type: ignore[no-untyped-def]
                right = builder.gep(from_b, [builder.mul(builder.sdiv(p, INT(together)), b_step)])
                right = builder.bitcast(right, WORD.as_pointer())
                columns = [load(builder, builder.gep(right, [INT(part)])) for part in parts]
                results, totals = [], iter(sums)
                for row in range(rows):
                    further = builder.add(builder.mul(a_step, INT(row)), builder.mul(p, INT(4 // together)))
                    left = builder.bitcast(builder.gep(from_a, [further]), WORD.as_pointer())
                    inputs = spread(builder, builder.load(left))
                    results += [join(builder, next(totals), inputs, column) for column in columns]
                return results

            for total, place in zip(loop(builder, INT(0), k, together, sums, inward), places, strict=True):
                store(builder, total, place)

        _for_each_block(builder, m, n, rows, len(parts) * LANES, block)

    return form


def _add_pairs(builder: ir.IRBuilder, total: ir.Value, inputs: ir.Value, column: ir.Value) -> ir.Value:
    inputs, column = builder.bitcast(inputs, PAIRS), builder.bitcast(column, PAIRS)
    return llvm(builder, "x86.avx512bf16.dpbf16ps.512", FLOATS, total, inputs, column)


def _add_products(builder: ir.IRBuilder, total: ir.Value, inputs: ir.Value, column: ir.Value) -> ir.Value:
    return fma(builder, builder.bitcast(inputs, FLOATS), builder.bitcast(column, FLOATS), total)


def _for_each_block(builder, m, n, rows, columns, block):  # type: ignore[no-untyped-def]
    """block(row, column) for every so many rows and columns."""

    def down(i, _):  # type: ignore[no-untyped-def]
        def across(j, _):  # type: ignore[no-untyped-def]
            block(i, j)
            return []

        loop(builder, INT(0), n, columns, [], across)
        return []

    loop(builder, INT(0), m, rows, [], down)


def _product(form: Any) -> Any:
    @intrinsic
    def multiply(typing, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
        """c (m, n) = a (m, k) times b (k, n), or c more by it if `adds`; addresses, bytes from row to row."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            *rest, adds = arguments
            form(builder, *rest, builder.icmp_signed("!=", adds, INT(0)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


# Eight rows beside two vectors of columns fill the registers; where those are half as long, and few, four beside one.
by_tiles, by_pairs = _product(_by_tiles), _product(_in_registers(8, (0, LANES), 2, _add_pairs))
by_floats = _product(_in_registers(8 if WIDE else 4, (0, LANES) if WIDE else (0,), 1, _add_products))
multiply_narrow = by_tiles if TILES else by_pairs


@intrinsic
def multiply_packed(typing, a, b, step, size, c, c_step, adds):  # type: ignore[no-untyped-def]
    """c (32, 32) = a times b, or c more by it if `adds`, where there are tiles.

    a: for each sixteen rows, b: for each sixteen columns, `size` bytes of tiles one behind the other, and `step` bytes
    to the next sixteen; see `moves.pack`.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, b, step, size, c, c_step, adds = arguments

        def operands(p):  # type: ignore[no-untyped-def]
            left, right = at(builder, a, p), at(builder, b, p)
            line = INT(TILE_BYTES)
            return (left, builder.gep(left, [step])), line, (right, builder.gep(right, [step])), line

        adds = builder.icmp_signed("!=", adds, INT(0))
        _add_tiles(builder, at(builder, c), c_step, adds, size, TILE_ROWS * TILE_BYTES, operands)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def take_tiles(typing):  # type: ignore[no-untyped-def]
    """Give all eight tiles of this thread sixteen rows of 64 bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if TILES:
            shape = bytearray(64)
            shape[0] = 1  # the only palette there is
            for tile in range(8):
                shape[16 + 2 * tile], shape[48 + tile] = TILE_BYTES, TILE_ROWS
            told = cgutils.global_constant(builder, "tiles", ir.Constant(ir.ArrayType(BYTE, 64), shape))
            llvm(builder, "x86.ldtilecfg", ir.VoidType(), builder.bitcast(told, BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def leave_tiles(typing):  # type: ignore[no-untyped-def]
    """Have no tiles any more, which the system would have to keep."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if TILES:
            llvm(builder, "x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate
