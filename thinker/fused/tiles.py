"""Products of bfloat16 matrices as the processor's own instructions: tiles where it has AMX, else pairs in vectors.

An operand on the left lies row by row; on the right, pairs of rows lie interleaved, as both instructions want them:
(k / 2, n, 2). Sums are float32. Who packs what is the kernels' business.
"""

# m rows, n columns, k inputs

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled.memory import pointer
from ..compiled.processor import TILES
from ..compiled.vectors import BYTE, FLOAT, FLOATS, INT, LANES, WORD, load, loop, same, spread, store
from .narrow import PAIRS, call

STEP = 32  # m, n and k are multiples of it
TILE_ROWS, TILE_BYTES = 16, 64
TALL = 8  # rows whose sums fill the registers, beside two vectors of columns


def at(builder: ir.IRBuilder, address: ir.Value, *bytes_: ir.Value) -> ir.Value:
    """A pointer so many bytes further."""
    return pointer(builder, address, BYTE, *bytes_)


def _by_tiles(builder, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
    """Blocks of two by two tiles of sums, which are four of the eight that there are."""
    void = ir.VoidType()
    lower_a, lower_c = builder.mul(a_step, INT(TILE_ROWS)), builder.mul(c_step, INT(TILE_ROWS))

    def block(i, _):  # type: ignore[no-untyped-def]
        def across(j, _):  # type: ignore[no-untyped-def]
            start = builder.add(builder.mul(i, c_step), builder.mul(j, INT(4)))
            corners = [
                at(builder, c, start, further, INT(right)) for further in (INT(0), lower_c) for right in (0, TILE_BYTES)
            ]
            with builder.if_else(builder.icmp_signed("!=", adds, INT(0))) as (then, otherwise):
                with then:
                    for tile, corner in enumerate(corners):
                        call(builder, "x86.tileloadd64", void, BYTE(tile), corner, c_step)
                with otherwise:
                    for tile in range(4):
                        call(builder, "x86.tilezero", void, BYTE(tile))

            def inward(p, _):  # type: ignore[no-untyped-def]
                from_a = builder.add(builder.mul(i, a_step), builder.mul(p, INT(2)))
                from_b = builder.add(builder.mul(builder.sdiv(p, INT(2)), b_step), builder.mul(j, INT(4)))
                call(builder, "x86.tileloadd64", void, BYTE(4), at(builder, a, from_a), a_step)
                call(builder, "x86.tileloadd64", void, BYTE(6), at(builder, b, from_b), b_step)
                call(builder, "x86.tileloadd64", void, BYTE(5), at(builder, a, from_a, lower_a), a_step)
                call(builder, "x86.tileloadd64", void, BYTE(7), at(builder, b, from_b, INT(TILE_BYTES)), b_step)
                for tile in range(4):
                    call(builder, "x86.tdpbf16ps", void, BYTE(tile), BYTE(4 + tile // 2), BYTE(6 + tile % 2))
                return []

            loop(builder, INT(0), k, STEP, [], inward)
            for tile, corner in enumerate(corners):
                call(builder, "x86.tilestored64", void, BYTE(tile), corner, c_step)
            return []

        loop(builder, INT(0), n, STEP, [], across)
        return []

    loop(builder, INT(0), m, STEP, [], block)


def _by_pairs(builder, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
    """Blocks of eight rows by two vectors of sums."""

    def block(i, _):  # type: ignore[no-untyped-def]
        def across(j, _):  # type: ignore[no-untyped-def]
            sums = []
            places = []
            for row in range(TALL):
                for right in range(2):
                    start = builder.mul(builder.add(i, INT(row)), c_step)
                    further = builder.mul(builder.add(j, INT(right * LANES)), INT(4))
                    place = builder.bitcast(at(builder, c, start, further), FLOAT.as_pointer())
                    places.append(place)
                    before = builder.select(
                        builder.icmp_signed("!=", adds, INT(0)), load(builder, place), same(FLOATS, 0.0)
                    )
                    sums.append(before)

            def inward(p, sums):  # type: ignore[no-untyped-def]
                from_b = builder.add(builder.mul(builder.sdiv(p, INT(2)), b_step), builder.mul(j, INT(4)))
                right = [
                    builder.bitcast(
                        load(builder, builder.bitcast(at(builder, b, from_b, INT(64 * v)), WORD.as_pointer())), PAIRS
                    )
                    for v in range(2)
                ]
                results = []
                for row in range(TALL):
                    from_a = builder.add(builder.mul(builder.add(i, INT(row)), a_step), builder.mul(p, INT(2)))
                    word = builder.bitcast(at(builder, a, from_a), WORD.as_pointer())
                    left = builder.bitcast(spread(builder, builder.load(word)), PAIRS)
                    for v in range(2):
                        results.append(
                            call(builder, "x86.avx512bf16.dpbf16ps.512", FLOATS, sums[2 * row + v], left, right[v])
                        )
                return results

            for total, place in zip(loop(builder, INT(0), k, 2, sums, inward), places, strict=True):
                store(builder, total, place)
            return []

        loop(builder, INT(0), n, 2 * LANES, [], across)
        return []

    loop(builder, INT(0), m, TALL, [], block)


def _product(form: Any) -> Any:
    @intrinsic
    def multiply(typing, a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
        """c (m, n) = a (m, k) times b (k / 2, n, 2), or c more by it if `adds`; addresses, bytes from row to row."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            form(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


by_tiles, by_pairs = _product(_by_tiles), _product(_by_pairs)
multiply = by_tiles if TILES else by_pairs


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
            call(builder, "x86.ldtilecfg", ir.VoidType(), builder.bitcast(told, BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def leave_tiles(typing):  # type: ignore[no-untyped-def]
    """Have no tiles any more, which the system would have to keep."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if TILES:
            call(builder, "x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate
