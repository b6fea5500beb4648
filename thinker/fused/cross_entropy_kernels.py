"""The compiled half of `cross_entropy.py`: one row of logits after another, in the nearest cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic

from ..compiled.memory import floats, integers, pointer, shorts, view_of, words
from ..compiled.shares import share
from ..compiled.vectors import FLOAT, FLOATS, INT, LANES, fma, folded, larger, load, loop, same, spread, store
from .cross_entropy import TASK
from .numbers import LOG2_E, NARROW, WIDE, Numbers, scaling

NOTHING = np.float32(-np.inf).view(np.int32)  # the logit of what can't be

tasks = view_of(from_dtype(TASK))


def _kernel(numbers: Numbers) -> Any:
    """A part of a task, of as many as there are threads."""
    size, scaled = numbers.size, scaling(numbers)
    elements, lower = (shorts, 16) if size == 2 else (words, 0)  # a number's bits, and how many float32 has below them

    def take_softmax(address, part):  # type: ignore[no-untyped-def]
        t = tasks(address, 0, 1)[0]
        first, end = share(part, t.parts, t.rows)
        for row in range(first, end):
            turn_to_errors(t, row, t.scratch + part * t.step_scratch)
        return 0

    @njit(error_model="numpy")
    def turn_to_errors(t, row, own):  # type: ignore[no-untyped-def]
        """One row. `own` has room for it in float32, and for a vector more."""
        V, whole, address = t.columns, t.columns // LANES * LANES, t.logits + size * row * t.columns
        target, logits = integers(t.targets, row, 1)[0], elements(address, 0, V)
        sums, margins = floats(t.sums, row, 1), floats(t.margins, row, 1)
        sums[0], margins[0] = 1, 0
        if not 0 <= target < V:
            for i in range(V):
                logits[i] = 0
            if target != t.ignored:
                margins[0] = np.nan
            return
        rest, chosen = words(own, whole, LANES), floats(own, target, 1)
        for i in range(LANES):
            rest[i] = np.int32(logits[whole + i]) << lower if whole + i < V else NOTHING
        highest = spread_out(address, whole, own)
        margins[0] = highest - chosen[0]
        sums[0] = to_powers(own, whole + LANES, highest)
        chosen[0] -= sums[0]
        factor = np.float32(1) / sums[0]
        scaled(own, whole, factor, address)
        scaled(own + 4 * whole, LANES, factor, own)
        last = elements(own, 0, LANES)
        for i in range(V - whole):
            logits[whole + i] = last[i]

    @intrinsic
    def spread_out(typing, source, count, target):  # type: ignore[no-untyped-def]
        """So many numbers in float32, and the largest of them and of the vector that is behind them there."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            source, count, target = arguments

            def some(c, tops):  # type: ignore[no-untyped-def]
                value = numbers.read(builder, source, c)
                store(builder, value, pointer(builder, target, FLOAT, c))
                return [larger(builder, value, tops[0])]

            rest = load(builder, pointer(builder, target, FLOAT, count))
            (tops,) = loop(builder, INT(0), count, LANES, [rest], some)
            return folded(builder, tops, larger)

        return types.float32(*[types.int64] * 3), generate

    @intrinsic
    def to_powers(typing, row, count, highest):  # type: ignore[no-untyped-def]
        """e^(number - highest) in place of each number of float32; their sum."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            row, count, highest = arguments
            scale = same(FLOATS, LOG2_E)
            below = builder.fneg(builder.fmul(spread(builder, highest), scale))

            def some(c, sums):  # type: ignore[no-untyped-def]
                place = pointer(builder, row, FLOAT, c)
                power = numbers.power_of_two(builder, fma(builder, load(builder, place), scale, below))
                store(builder, power, place)
                return [builder.fadd(sums[0], power)]

            (sums,) = loop(builder, INT(0), count, LANES, [same(FLOATS, 0.0)], some)
            return folded(builder, sums, ir.IRBuilder.fadd)

        return types.float32(*[types.int64] * 2, types.float32), generate

    return take_softmax


take_softmax_narrow, take_softmax_wide = _kernel(NARROW), _kernel(WIDE)
