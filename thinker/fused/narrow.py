"""Numbers in bfloat16, kept as int16, and powers that become such numbers, in vectors."""

from __future__ import annotations

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

LOG2_E = 1.4426950408889634  # a power of e is one of 2 with so many times its exponent
# Of 2^x its series' factors, of x, x², …: for |x| <= 1/2 within 4e-6, much less than a step of bfloat16.
POWERS = (0.6931472, 0.2402265, 0.05550411, 0.009618129, 0.0013333558)


class _BFloat(ir.Type):
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


NARROW, PAIRS = ir.VectorType(_BFloat(), LANES), ir.VectorType(_BFloat(), 2 * LANES)
SHORTS = ir.VectorType(SHORT, LANES)


def rounded(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 to the nearest bfloat16, of two the even one."""
    return builder.bitcast(llvm(builder, "x86.avx512bf16.cvtneps2bf16.512", NARROW, x), SHORTS)


def widened(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Back to float32, exactly."""
    return builder.bitcast(builder.shl(builder.zext(bits, WORDS), same(WORDS, 16)), FLOATS)


def read(builder: ir.IRBuilder, address: ir.Value, i: ir.Value) -> ir.Value:
    """Sixteen numbers of an array of bfloat16, from element i on, as float32."""
    return widened(builder, load(builder, pointer(builder, address, SHORT, i)))


def write(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, i: ir.Value) -> None:
    """float32 numbers to there, rounded."""
    store(builder, rounded(builder, value), pointer(builder, address, SHORT, i))


def power_of_two(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x; what is below 2^-126 becomes that, and NaN stays NaN."""
    lowest = same(FLOATS, -126.0)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    shifted = builder.fadd(x, same(FLOATS, MAGIC))
    rest = builder.fsub(x, builder.fsub(shifted, same(FLOATS, MAGIC)))
    power = same(FLOATS, POWERS[-1])
    for factor in (*POWERS[-2::-1], 1.0):
        power = fma(builder, power, rest, same(FLOATS, factor))
    exponent = builder.shl(builder.bitcast(shifted, WORDS), same(WORDS, 23))
    return builder.bitcast(builder.add(builder.bitcast(power, WORDS), exponent), FLOATS)


@intrinsic
def narrowed(typing, source, count, factor, target):  # type: ignore[no-untyped-def]
    """A row of float32, times a number, in bfloat16."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, count, factor, target = arguments
        factor = spread(builder, factor)

        def some(c, _):  # type: ignore[no-untyped-def]
            value = builder.fmul(load(builder, pointer(builder, source, FLOAT, c)), factor)
            write(builder, value, target, c)
            return []

        loop(builder, INT(0), count, LANES, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2, types.float32, types.int64), generate
