"""The compiled half of `gating.py`: one pass over the numbers, in which silu's exponential is taken once."""

from __future__ import annotations

from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

from ..compiled.memory import view_of
from ..compiled.shares import share
from ..compiled.vectors import FLOATS, LANES, loop, same
from .gating import TASK
from .narrow import LOG2_E, power_of_two, read, write

tasks = view_of(from_dtype(TASK))


def forward(address, part):  # type: ignore[no-untyped-def]
    """A part of a task, of as many as there are threads."""
    t = tasks(address, 0, 1)[0]
    first, end = share(part, t.parts, t.vectors)
    multiply(t.gate, t.up, first * LANES, end * LANES, t.y)
    return 0


def backward(address, part):  # type: ignore[no-untyped-def]
    """A part of a task, of as many as there are threads."""
    t = tasks(address, 0, 1)[0]
    first, end = share(part, t.parts, t.vectors)
    differentiate(t.y_grad, t.gate, t.up, first * LANES, end * LANES, t.gate_grad, t.up_grad)
    return 0


@intrinsic
def multiply(typing, gate, up, first, end, y):  # type: ignore[no-untyped-def]
    """y = silu(gate) * up in elements `first` to `end` - 1."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        gate, up, first, end, y = arguments

        def some(i, _):  # type: ignore[no-untyped-def]
            g, u = (read(builder, x, i) for x in (gate, up))
            write(builder, builder.fmul(builder.fmul(g, sigmoid(builder, g)), u), y, i)
            return []

        loop(builder, first, end, LANES, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def differentiate(typing, y_grad, gate, up, first, end, gate_grad, up_grad):  # type: ignore[no-untyped-def]
    """The gradients of gate and up there."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        y_grad, gate, up, first, end, gate_grad, up_grad = arguments

        def some(i, _):  # type: ignore[no-untyped-def]
            d, g, u = (read(builder, x, i) for x in (y_grad, gate, up))
            part = sigmoid(builder, g)
            silu = builder.fmul(g, part)
            # silu(g) = g s(g), and s' = s (1 - s), so that its slope is s + g s (1 - s).
            slope = builder.fadd(part, builder.fmul(silu, builder.fsub(same(FLOATS, 1.0), part)))
            write(builder, builder.fmul(builder.fmul(d, u), slope), gate_grad, i)
            write(builder, builder.fmul(d, silu), up_grad, i)
            return []

        loop(builder, first, end, LANES, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The logistic function."""
    exponent, most = builder.fmul(x, same(FLOATS, -LOG2_E)), same(FLOATS, 126.0)
    exponent = builder.select(builder.fcmp_ordered(">", exponent, most), most, exponent)
    one = same(FLOATS, 1.0)
    return builder.fdiv(one, builder.fadd(one, power_of_two(builder, exponent)))
