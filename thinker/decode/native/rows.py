"""One row at a time, written as vector instructions: folded to a number, or rounded for products with INT8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...compiled.memory import pointer
from ...compiled.processor import DOTS
from ...compiled.vectors import (
    BYTE,
    FLOAT,
    FLOATS,
    INT,
    LANES,
    MAGIC,
    SHORT,
    WORD,
    WORDS,
    larger,
    llvm,
    load,
    loop,
    same,
    spread,
)
from .layout import BLOCK

LARGEST = 127 * 256  # of a block's integers: its higher byte still fits
SMALLEST = 1e-30  # of a block's numbers, unless they count as zeros
MAGIC_BITS = int(np.float32(MAGIC).view(np.int32))


def _add(builder: ir.IRBuilder, value: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(value, total)


def _add_square(builder: ir.IRBuilder, value: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(value, value), total)


def _fold(start: float, take: Callable[..., ir.Value], join: Callable[..., ir.Value]) -> Any:
    """A row folded to one number: sixteen results over every sixteenth element, joined in pairs, then the leftover."""

    @intrinsic
    def fold(typing, x):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            row = context.make_array(signature.args[0])(context, builder, arguments[0])
            whole = builder.sub(row.nitems, builder.srem(row.nitems, INT(LANES)))

            def take_lanes(i, results):  # type: ignore[no-untyped-def]
                return [take(builder, load(builder, builder.gep(row.data, [i])), results[0])]

            def take_one(i, results):  # type: ignore[no-untyped-def]
                return [take(builder, builder.load(builder.gep(row.data, [i])), results[0])]

            (lanes,) = loop(builder, INT(0), whole, LANES, [same(FLOATS, start)], take_lanes)
            results = [builder.extract_element(lanes, WORD(lane)) for lane in range(LANES)]
            while len(results) > 1:
                results = [join(builder, a, b) for a, b in zip(results[::2], results[1::2], strict=True)]
            return loop(builder, whole, row.nitems, 1, results, take_one)[0]

        return types.float32(x), generate

    return fold


sum_of = _fold(0.0, _add, _add)
sum_of_squares = _fold(0.0, _add_square, _add)
largest = _fold(float("-inf"), larger, larger)


def _reduced(builder: ir.IRBuilder, operation: str, vector: ir.Value) -> ir.Value:
    """A vector of integers joined to one, exactly, in whatever order."""
    return llvm(builder, f"vector.reduce.{operation}.v{LANES}i32", WORD, vector)


def _rounding(dots: bool = DOTS) -> Any:
    """Round k numbers of a row to blocks of integers with a float32 scale each; of two as near to the even one.

    Eight bits, as llama.cpp has them, answer worse: one number in a block can be a thousand times the others. In
    memory: each block's int16, or if bytes are what the processor multiplies (`dots`) first its higher bytes and then
    the lower ones, both with a sign; behind them all blocks' scales, then for each block -128 times the sum of its
    integers, since weights lie as bytes that are 128 too large.
    """

    @intrinsic
    def to_int16(typing, x, x_at, k, out, out_at):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, x_at, k, out, out_at = arguments
            values, quants = pointer(builder, x, FLOAT, x_at), pointer(builder, out, BYTE, out_at)
            scales = builder.bitcast(builder.gep(quants, [builder.mul(k, INT(2))]), FLOAT.as_pointer())
            begins = builder.bitcast(builder.gep(scales, [builder.sdiv(k, INT(BLOCK))]), WORD.as_pointer())

            def keep(whole, element, at):  # type: ignore[no-untyped-def]
                """The last bits of integers, from byte `at` of the row on."""
                narrow = builder.trunc(whole, ir.VectorType(element, LANES))
                place = builder.bitcast(builder.gep(quants, [at]), narrow.type.as_pointer())
                builder.store(narrow, place).align = 1

            def block(j, _):  # type: ignore[no-untyped-def]
                halves = [
                    load(builder, builder.gep(values, [builder.add(j, INT(at))])) for at in range(0, BLOCK, LANES)
                ]
                # Without their sign, the bits of floats are in the order of their sizes.
                sizes = [builder.and_(builder.bitcast(half, WORDS), same(WORDS, 0x7FFFFFFF)) for half in halves]
                larger = builder.select(builder.icmp_signed(">", *sizes), *sizes)
                size = builder.bitcast(_reduced(builder, "smax", larger), FLOAT)
                place, begin = builder.sdiv(j, INT(BLOCK)), builder.mul(j, INT(2))
                builder.store(builder.fdiv(size, FLOAT(LARGEST)), builder.gep(scales, [place]))
                usable = builder.fcmp_ordered(">", size, FLOAT(SMALLEST))
                factor = spread(builder, builder.select(usable, builder.fdiv(FLOAT(LARGEST), size), FLOAT(0.0)))
                total = same(WORDS, 0)
                for i, half in enumerate(halves):
                    moved = builder.fadd(builder.fmul(half, factor), same(FLOATS, MAGIC))
                    whole = builder.sub(builder.bitcast(moved, WORDS), same(WORDS, MAGIC_BITS))
                    if dots:
                        higher = builder.ashr(builder.add(whole, same(WORDS, 128)), same(WORDS, 8))
                        keep(higher, BYTE, builder.add(begin, INT(i * LANES)))
                        keep(whole, BYTE, builder.add(begin, INT(BLOCK + i * LANES)))
                    else:
                        keep(whole, SHORT, builder.add(begin, INT(2 * i * LANES)))
                    total = builder.add(total, whole)
                lacking = builder.mul(_reduced(builder, "add", total), WORD(-128))
                builder.store(lacking, builder.gep(begins, [place]))
                return []

            loop(builder, INT(0), k, BLOCK, [], block)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return to_int16


to_int16 = _rounding()
