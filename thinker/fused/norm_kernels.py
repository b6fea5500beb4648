"""The compiled half of `norm.py`: row by row, which the nearest cache holds between a row's two passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic

from ..compiled.memory import floats, pointer, view_of
from ..compiled.shares import share
from ..compiled.vectors import FLOAT, FLOATS, INT, LANES, fma, folded, load, loop, same, spread, store
from .norm import ROWS, TASK
from .numbers import NARROW, WIDE, Numbers

tasks = view_of(from_dtype(TASK))


@njit(error_model="numpy", inline="always")
def place(t, view, row, size):  # type: ignore[no-untyped-def]
    """A row's address, of numbers of so many bytes."""
    outer, rest = row // (t.middle * t.inner), row % (t.middle * t.inner)
    at = outer * view.outer + rest // t.inner * view.middle + rest % t.inner * view.inner
    return view.data + at * size


@njit(error_model="numpy", inline="always")
def factor(t, squares):  # type: ignore[no-untyped-def]
    """What a row with this sum of squares is multiplied by."""
    return np.float32(1) / np.sqrt(squares / np.float32(t.width) + t.eps)


def _kernels(numbers: Numbers) -> tuple[Any, Any]:
    """Forwards and back: a part of a task, of as many as there are threads."""
    size = numbers.size

    @intrinsic
    def squares(typing, x, width):  # type: ignore[no-untyped-def]
        """The sum of a row's squares."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, width = arguments

            def some(i, sums):  # type: ignore[no-untyped-def]
                value = numbers.read(builder, x, i)
                return [fma(builder, value, value, sums[0])]

            (sums,) = loop(builder, INT(0), width, LANES, [same(FLOATS, 0.0)], some)
            return folded(builder, sums, ir.IRBuilder.fadd)

        return types.float32(types.int64, types.int64), generate

    @intrinsic
    def scaled(typing, x, width, factor, scale, y):  # type: ignore[no-untyped-def]
        """y = x * factor * scale."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, width, factor, scale, y = arguments
            factor = spread(builder, factor)

            def some(i, _):  # type: ignore[no-untyped-def]
                value = builder.fmul(numbers.read(builder, x, i), factor)
                numbers.write(builder, builder.fmul(value, load(builder, pointer(builder, scale, FLOAT, i))), y, i)
                return []

            loop(builder, INT(0), width, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 2, types.float32, *[types.int64] * 2), generate

    @intrinsic
    def differentiate(typing, x, y_grad, width, scale, factor, sums, x_grad):  # type: ignore[no-untyped-def]
        """A row's gradient, and the scale's, added to `sums`."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, y_grad, width, scale, factor, sums, x_grad = arguments
            factor = spread(builder, factor)

            def add(i, totals):  # type: ignore[no-untyped-def]
                normed, grad = builder.fmul(numbers.read(builder, x, i), factor), numbers.read(builder, y_grad, i)
                place = pointer(builder, sums, FLOAT, i)
                store(builder, fma(builder, normed, grad, load(builder, place)), place)
                grad = builder.fmul(grad, load(builder, pointer(builder, scale, FLOAT, i)))
                return [fma(builder, normed, grad, totals[0])]

            (totals,) = loop(builder, INT(0), width, LANES, [same(FLOATS, 0.0)], add)
            mean = builder.fdiv(folded(builder, totals, ir.IRBuilder.fadd), builder.sitofp(width, FLOAT))
            taken = builder.fneg(spread(builder, mean))

            def some(i, _):  # type: ignore[no-untyped-def]
                normed, grad = builder.fmul(numbers.read(builder, x, i), factor), numbers.read(builder, y_grad, i)
                grad = builder.fmul(grad, load(builder, pointer(builder, scale, FLOAT, i)))
                numbers.write(builder, builder.fmul(fma(builder, normed, taken, grad), factor), x_grad, i)
                return []

            loop(builder, INT(0), width, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, *[types.int64] * 2), generate

    def forward(address, part):  # type: ignore[no-untyped-def]
        t = tasks(address, 0, 1)[0]
        first, end = share(part, t.parts, t.rows)
        for row in range(first, end):
            x, y = place(t, t.x, row, size), place(t, t.y, row, size)
            scaled(x, t.width, factor(t, squares(x, t.width)), t.scale, y)
        return 0

    def backward(address, part):  # type: ignore[no-untyped-def]
        t = tasks(address, 0, 1)[0]
        first, end = share(part, t.parts, (t.rows + ROWS - 1) // ROWS)
        for block in range(first, end):
            sums = t.sums + 4 * block * t.width
            total = floats(sums, 0, t.width)
            for i in range(t.width):
                total[i] = 0
            for row in range(block * ROWS, min((block + 1) * ROWS, t.rows)):
                x, y_grad = place(t, t.x, row, size), place(t, t.y_grad, row, size)
                x_grad = place(t, t.x_grad, row, size)
                differentiate(x, y_grad, t.width, t.scale, factor(t, squares(x, t.width)), sums, x_grad)
        return 0

    return forward, backward


forward_narrow, backward_narrow = _kernels(NARROW)
forward_wide, backward_wide = _kernels(WIDE)
