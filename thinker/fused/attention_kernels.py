"""The compiled half of `attention.py`: causal attention with its gradients, head by head in a core's own cache.

A thread takes a key/value head of one row of the batch with all its query heads. Scores exist for a few queries and
keys at a time, and are made again on the way back (arXiv 2205.14135): there in columns, a key's weights for many
queries, so that what is a row or a pair of rows in one product is what the next one wants. A query's weights stay
undivided to the end; the sum that divides them is kept with their largest score. Every number is one thread's work.

In packed rows a query sees nothing before the start of its text. Starts never fall, so blocks that nobody sees are left
out: those that end before the start of their first query.
"""

# T tokens, padded to a multiple of 32; H query heads, G key/value heads, W head_dim

from __future__ import annotations

from typing import Any

import numpy as np
from numba import from_dtype, njit

from ..compiled.memory import floats, shorts, view_of, words
from ..compiled.shares import share
from ..compiled.vectors import LANES
from .attention import BLOCK, PIECE, TASK
from .attention_rows import dividing, softening, turning, weighing
from .moves import interleave, padded_rows, side_by_side, transpose
from .numbers import NARROW, WIDE, Numbers, scaling
from .tiles import by_floats, leave_tiles, multiply_narrow, take_tiles

tasks = view_of(from_dtype(TASK))


@njit(error_model="numpy", inline="always")
def angles(t, row, token):  # type: ignore[no-untyped-def]
    """The address of the cosines of a token's place."""
    return t.cos + 4 * (row * t.step_angles + token * (t.width // 2))


@njit(error_model="numpy", inline="always")
def starts_of(t, row):  # type: ignore[no-untyped-def]
    """Where the text of each token of a row begins, int32 (padded,)."""
    return words(t.starts, row * t.padded, t.padded)


def _kernels(numbers: Numbers, multiply: Any, beside: Any) -> tuple[Any, Any]:
    """Forwards and back: a part of a task, of as many as there are threads.

    `multiply` multiplies such numbers; `beside` lays rows as it wants them on the right.
    """
    size, pieces, scaled = numbers.size, numbers.size // 2, scaling(numbers)  # a piece is two bytes
    turned, turned_back = turning(numbers, back=False), turning(numbers, back=True)
    divided, soften, weigh_again = dividing(numbers), softening(numbers), weighing(numbers)

    def forward(address, part):  # type: ignore[no-untyped-def]
        return do_part(address, part, attend)

    def backward(address, part):  # type: ignore[no-untyped-def]
        return do_part(address, part, differentiate)

    @njit(error_model="numpy")
    def do_part(address, part, work):  # type: ignore[no-untyped-def]
        """work(task, own memory, row of the batch, group) for each group of a part."""
        t = tasks(address, 0, 1)[0]
        if size == 2:
            take_tiles()
        first, end = share(part, t.parts, t.items)
        for item in range(first, end):
            work(t, t.scratch + part * t.step_scratch, item // t.groups, item % t.groups)
        if size == 2:
            leave_tiles()
        return 0

    @njit(error_model="numpy", inline="always")
    def start(view, row, head):  # type: ignore[no-untyped-def]
        """The address of a head's first token."""
        return view.data + size * (row * view.batch + head * view.head)

    @njit(error_model="numpy", inline="always")
    def rows_of(t, view, row, head, own):  # type: ignore[no-untyped-def]
        """The address of a head's rows, padded, and how many elements they are apart: where they are, or a copy."""
        at, step = start(view, row, head), view.token
        if t.length != t.padded:
            padded_rows(at, pieces * step, t.length, t.padded, pieces * t.width, own)
            at, step = own, t.width
        return at, step

    @njit(error_model="numpy")
    def turned_rows_of(t, view, row, head, own):  # type: ignore[no-untyped-def]
        """The same for queries and keys, which are turned by their places first, if so wanted."""
        at, step = rows_of(t, view, row, head, own)
        if not t.turns:
            return at, step
        for token in range(t.length):
            source, to, cos = at + size * token * step, own + size * token * t.width, angles(t, row, token)
            turned(source, t.width, cos, t.sin - t.cos, np.float32(1), to)
        return own, t.width

    @njit(error_model="numpy")
    def attend(t, own, row, group):  # type: ignore[no-untyped-def]
        """The outputs of one group's heads."""
        T, W, padded, wide_step = t.length, t.width, t.padded, 4 * (t.padded + LANES)
        keys, values, scores = own + t.keys, own + t.values, own + t.scores
        weights, sums = own + t.weights, own + t.sums
        k, step = turned_rows_of(t, t.k, row, group, own + t.rows)
        transpose(k, size * step, padded, size * W // 4, keys, wide_step)
        v, step = rows_of(t, t.v, row, group, own + t.rows)
        beside(v, step, padded, W, values)
        repeats, starts = t.heads // t.groups, starts_of(t, row)
        for head in range(group * repeats, (group + 1) * repeats):
            at = (row * t.heads + head) * padded
            q, step = turned_rows_of(t, t.q, row, head, own + t.rows)
            for first in range(0, padded, BLOCK):
                begin, count = starts[first] // BLOCK * BLOCK, min(BLOCK, T - first)
                columns = first + BLOCK - begin
                multiply(
                    q + size * first * step, size * step, keys + 4 * begin, wide_step, scores, 4 * columns,
                    BLOCK, columns, W, 0,
                )  # fmt: skip
                for i in range(BLOCK):
                    from_scores, to, kept = scores + 4 * i * columns, weights + size * i * columns, 4 * (at + first + i)
                    seen, end = starts[first + i] - begin, first + i + 1 - begin
                    soften(from_scores, seen, end, columns, t.factor, to, t.tops + kept, t.totals + kept)
                multiply(weights, size * columns, values + size * begin * W, 4 * W, sums, 4 * W, BLOCK, W, columns, 0)
                for i in range(count):
                    factor = np.float32(1) / floats(t.totals, at + first + i, 1)[0]
                    scaled(sums + 4 * i * W, W, factor, start(t.y, row, head) + size * (first + i) * t.y.token)

    @njit(error_model="numpy")
    def differentiate(t, own, row, group):  # type: ignore[no-untyped-def]
        """The gradients of one group's keys and values and of its heads' queries."""
        T, W, padded, wide_step = t.length, t.width, t.padded, 4 * (t.padded + LANES)
        scores, grads, weights, errors = own + t.scores, own + t.grads, own + t.weights, own + t.errors
        inner, flat = own + t.inner, own + t.flat
        paired = own + t.paired if size == 2 else errors
        k, step_k = turned_rows_of(t, t.k, row, group, own + t.keys)
        beside(k, step_k, padded, W, own + t.rows)
        flat_step = size * (padded + 2 * LANES)
        transpose(own + t.rows, 4 * W, size * padded // 4, W, flat, flat_step)  # words, or pairs of them: (W, padded)
        v, step_v = rows_of(t, t.v, row, group, own + t.values)
        repeats, starts = t.heads // t.groups, starts_of(t, row)
        for repeat in range(repeats):
            head = group * repeats + repeat
            at = (row * t.heads + head) * padded
            q, step = turned_rows_of(t, t.q, row, head, own + t.rows)
            transpose(q, size * step, padded, size * W // 4, own + t.turned_q, wide_step)
            beside(q, step, padded, W, own + t.paired_q)
            divide_upstream(t, row, head, own + t.rows, inner)
            transpose(own + t.rows, size * W, padded, size * W // 4, own + t.turned_y, wide_step)
            beside(own + t.rows, W, padded, W, own + t.paired_y)
            for key in range(0, padded, PIECE):
                count = min(PIECE, padded - key)
                for query in range(key, padded, PIECE):
                    if starts[query] >= key + count:
                        break
                    columns = min(PIECE, padded - query)
                    wide, narrow, right = 4 * columns, size * columns, 4 * query
                    multiply(
                        k + size * key * step_k, size * step_k, own + t.turned_q + right, wide_step, scores, wide,
                        count, columns, W, 0,
                    )  # fmt: skip
                    multiply(
                        v + size * key * step_v, size * step_v, own + t.turned_y + right, wide_step, grads, wide,
                        count, columns, W, 0,
                    )  # fmt: skip
                    for i in range(0, count, 2):
                        weigh_again(
                            scores + i * wide, grads + i * wide, columns, key + i, query, t.factor,
                            t.starts + 4 * row * padded + right, t.tops + 4 * at + right, inner + right,
                            weights + i * narrow, errors + i * narrow, paired + i * narrow,
                        )  # fmt: skip
                    more, to, row_bytes = repeat > 0 or query > key, 4 * key * W, 4 * W
                    multiply(
                        weights, narrow, own + t.paired_y + size * query * W, row_bytes, own + t.v_sums + to, row_bytes,
                        count, W, columns, more,
                    )  # fmt: skip
                    multiply(
                        errors, narrow, own + t.paired_q + size * query * W, row_bytes, own + t.k_sums + to, row_bytes,
                        count, W, columns, more,
                    )  # fmt: skip
                    multiply(
                        flat + size * key, flat_step, paired, wide, own + t.q_sums + right, wide_step,
                        W, columns, count, key > starts[query],
                    )  # fmt: skip
            transpose(own + t.q_sums, wide_step, W, padded, own + t.q_rows, 4 * W)
            keep_gradients(t, row, own + t.q_rows, t.q_grad, head)
        keep_gradients(t, row, own + t.k_sums, t.k_grad, group)
        for token in range(T):
            to = start(t.v_grad, row, group) + size * token * t.v_grad.token
            scaled(own + t.v_sums + 4 * token * W, W, np.float32(1), to)

    @njit(error_model="numpy")
    def keep_gradients(t, row, sums, view, head):  # type: ignore[no-untyped-def]
        """A head's gradients, float32 (T, W), scaled and turned back to where they belong."""
        for token in range(t.length):
            source, to = sums + 4 * token * t.width, start(view, row, head) + size * token * view.token
            if t.turns:
                turned_back(source, t.width, angles(t, row, token), t.sin - t.cos, t.scale, to)
            else:
                scaled(source, t.width, t.scale, to)

    @njit(error_model="numpy")
    def divide_upstream(t, row, head, rows, inner):  # type: ignore[no-untyped-def]
        """A head's outputs' gradients, divided by their weights' sums, as rows; and what softmax takes off each one's.

        That is the sum of weight times gradient, which is that of output times gradient.
        """
        T, W, padded = t.length, t.width, t.padded
        totals = floats(t.totals, (row * t.heads + head) * padded, padded)
        y, upstream = start(t.y, row, head), start(t.y_grad, row, head)
        for token in range(T):
            divided(
                upstream + size * token * t.y_grad.token, y + size * token * t.y.token, W,
                np.float32(1) / totals[token], rows + size * token * W, inner + 4 * token,
            )  # fmt: skip
        nothing, taken = shorts(rows, pieces * T * W, pieces * (padded - T) * W), floats(inner, T, padded - T)
        for i in range(pieces * (padded - T) * W):
            nothing[i] = 0
        for i in range(padded - T):
            taken[i] = 0

    return forward, backward


forward_narrow, backward_narrow = _kernels(NARROW, multiply_narrow, interleave)
forward_wide, backward_wide = _kernels(WIDE, by_floats, side_by_side)
