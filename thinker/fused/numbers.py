"""The types of numbers that kernels read and write, bfloat16 (as int16) and float32; in vectors all are float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..compiled.memory import pointer
from ..compiled.vectors import (
    FLOAT,
    FLOATS,
    INT,
    LANES,
    MAGIC,
    SHORT,
    WORDS,
    fma,
    llvm,
    load,
    loop,
    same,
    spread,
    store,
)

Convert = Callable[[ir.IRBuilder, ir.Value], ir.Value]

LOG2_E = 1.4426950408889634  # a power of e is one of 2 with so many times its exponent


@dataclass(frozen=True)
class Numbers:
    """A type of numbers in memory."""

    size: int  # bytes
    element: ir.Type
    rounded: Convert  # a vector of float32 as it is kept
    widened: Convert  # and back, exactly
    powers: tuple[float, ...]  # of 2^x its series' factors, of x, x², …

    def read(self, builder: ir.IRBuilder, address: ir.Value, i: ir.Value) -> ir.Value:
        """Sixteen numbers of an array, from element i on, as float32."""
        return self.widened(builder, load(builder, pointer(builder, address, self.element, i)))

    def write(self, builder: ir.IRBuilder, value: ir.Value, address: ir.Value, i: ir.Value) -> None:
        """float32 numbers to there, rounded."""
        store(builder, self.rounded(builder, value), pointer(builder, address, self.element, i))

    def power_of_two(self, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """2^x; what is below 2^-127 becomes zero, and NaN stays NaN."""
        lowest = same(FLOATS, -127.0)  # whose exponent is that of zero
        x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
        shifted = builder.fadd(x, same(FLOATS, MAGIC))
        rest = builder.fsub(x, builder.fsub(shifted, same(FLOATS, MAGIC)))
        power = same(FLOATS, self.powers[-1])
        for factor in (*self.powers[-2::-1], 1.0):
            power = fma(builder, power, rest, same(FLOATS, factor))
        exponent = builder.shl(builder.bitcast(shifted, WORDS), same(WORDS, 23))
        return builder.bitcast(builder.add(builder.bitcast(power, WORDS), exponent), FLOATS)


class _BFloat(ir.Type):
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def _rounded(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 to the nearest bfloat16, of two the even one."""
    kind = ir.VectorType(_BFloat(), LANES)
    return builder.bitcast(llvm(builder, "x86.avx512bf16.cvtneps2bf16.512", kind, x), ir.VectorType(SHORT, LANES))


def _widened(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(bits, WORDS), same(WORDS, 16)), FLOATS)


def _as_it_is(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return x


# For |x| <= 1/2 within 4e-6, much less than a step of bfloat16; and within 1e-8, a sixth of half a step of float32.
NARROW = Numbers(2, SHORT, _rounded, _widened, (0.6931472, 0.2402265, 0.05550411, 0.009618129, 0.0013333558))
WIDE = Numbers(
    4, FLOAT, _as_it_is, _as_it_is,
    (0.6931471806, 0.2402265070, 0.0555041087, 0.0096181291, 0.0013333558, 0.0001540353, 0.0000152527),
)  # fmt: skip


def scaling(numbers: Numbers) -> Any:
    """scaled(source, count, factor, target): a row of float32, times a number, as such numbers."""

    @intrinsic
    def scaled(typing, source, count, factor, target):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            source, count, factor, target = arguments
            factor = spread(builder, factor)

            def some(c, _):  # type: ignore[no-untyped-def]
                value = builder.fmul(load(builder, pointer(builder, source, FLOAT, c)), factor)
                numbers.write(builder, value, target, c)
                return []

            loop(builder, INT(0), count, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 2, types.float32, types.int64), generate

    return scaled
