"""The compiled half of `gating.py`: one pass over the numbers, in which silu's exponential is taken once."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

from ..compiled.memory import view_of
from ..compiled.shares import share
from ..compiled.vectors import FLOATS, LANES, loop, same
from .gating import TASK
from .numbers import LOG2_E, NARROW, WIDE, Numbers

tasks = view_of(from_dtype(TASK))


def _kernels(numbers: Numbers) -> tuple[Any, Any]:
    """Forwards and back: a part of a task, of as many as there are threads."""

    @intrinsic
    def multiply(typing, gate, up, first, end, y):  # type: ignore[no-untyped-def]
        """y = silu(gate) * up in elements `first` to `end` - 1."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            gate, up, first, end, y = arguments

            def some(i, _):  # type: ignore[no-untyped-def]
                g, u = (numbers.read(builder, x, i) for x in (gate, up))
                silu = builder.fmul(g, sigmoid(builder, numbers, g))
                numbers.write(builder, builder.fmul(silu, u), y, i)
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
                d, g, u = (numbers.read(builder, x, i) for x in (y_grad, gate, up))
                part = sigmoid(builder, numbers, g)
                silu = builder.fmul(g, part)
                # silu(g) = g s(g), and s' = s (1 - s), so that its slope is s + g s (1 - s).
                slope = builder.fadd(part, builder.fmul(silu, builder.fsub(same(FLOATS, 1.0), part)))
                numbers.write(builder, builder.fmul(builder.fmul(d, u), slope), gate_grad, i)
                numbers.write(builder, builder.fmul(d, silu), up_grad, i)
                return []

            loop(builder, first, end, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    def forward(address, part):  # type: ignore[no-untyped-def]
        t = tasks(address, 0, 1)[0]
        first, end = share(part, t.parts, t.vectors)
        multiply(t.gate, t.up, first * LANES, end * LANES, t.y)
        return 0

    def backward(address, part):  # type: ignore[no-untyped-def]
        t = tasks(address, 0, 1)[0]
        first, end = share(part, t.parts, t.vectors)
        differentiate(t.y_grad, t.gate, t.up, first * LANES, end * LANES, t.gate_grad, t.up_grad)
        return 0

    return forward, backward


def sigmoid(builder: ir.IRBuilder, numbers: Numbers, x: ir.Value) -> ir.Value:
    """The logistic function."""
    exponent, most = builder.fmul(x, same(FLOATS, -LOG2_E)), same(FLOATS, 126.0)
    exponent = builder.select(builder.fcmp_ordered(">", exponent, most), most, exponent)
    one = same(FLOATS, 1.0)
    return builder.fdiv(one, builder.fadd(one, numbers.power_of_two(builder, exponent)))


forward_narrow, backward_narrow = _kernels(NARROW)
forward_wide, backward_wide = _kernels(WIDE)
