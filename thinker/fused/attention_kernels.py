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

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic

from ..compiled.memory import floats, pointer, shorts, view_of, words
from ..compiled.vectors import FLOAT, FLOATS, INT, LANES, SHORT, WORD, WORDS, fma, load, loop, same, spread, store
from .attention import BLOCK, PIECE, TASK
from .moves import interleave, padded_rows, transpose
from .narrow import from_bfloat16, power_of_two, rounded, to_bfloat16, widened
from .tiles import leave_tiles, multiply, take_tiles

tasks = view_of(from_dtype(TASK))


def forward(address, me):  # type: ignore[no-untyped-def]
    """One thread's part of a task."""
    t = tasks(address, 0, 1)[0]
    take_tiles()
    for item in range(t.items * me // t.threads, t.items * (me + 1) // t.threads):
        attend(t, t.scratch + me * t.step_scratch, item // t.groups, item % t.groups)
    leave_tiles()
    return 0


def backward(address, me):  # type: ignore[no-untyped-def]
    """One thread's part of a task."""
    t = tasks(address, 0, 1)[0]
    take_tiles()
    for item in range(t.items * me // t.threads, t.items * (me + 1) // t.threads):
        differentiate(t, t.scratch + me * t.step_scratch, item // t.groups, item % t.groups)
    leave_tiles()
    return 0


@njit(error_model="numpy", inline="always")
def start(view, row, head):  # type: ignore[no-untyped-def]
    """The address of a head's first token."""
    return view.data + 2 * (row * view.batch + head * view.head)


@njit(error_model="numpy", inline="always")
def rows_of(t, view, row, head, own):  # type: ignore[no-untyped-def]
    """The address of a head's rows, padded, and how many elements they are apart: where they are, or a copy."""
    at, step = start(view, row, head), view.token
    if t.length != t.padded:
        padded_rows(at, step, t.length, t.padded, t.width, own)
        at, step = own, t.width
    return at, step


@njit(error_model="numpy", inline="always")
def starts_of(t, row):  # type: ignore[no-untyped-def]
    """Where the text of each token of a row begins, int32 (padded,)."""
    return words(t.starts, row * t.padded, t.padded)


@njit(error_model="numpy")
def attend(t, own, row, group):  # type: ignore[no-untyped-def]
    """The outputs of one group's heads."""
    T, W, padded, turned = t.length, t.width, t.padded, 4 * (t.padded + LANES)
    keys, values, scores, weights, sums = own + t.keys, own + t.values, own + t.scores, own + t.weights, own + t.sums
    k, step = rows_of(t, t.k, row, group, own + t.rows)
    transpose(k, 2 * step, padded, W // 2, keys, turned)
    v, step = rows_of(t, t.v, row, group, own + t.rows)
    interleave(v, step, padded, W, values)
    repeats, starts = t.heads // t.groups, starts_of(t, row)
    for head in range(group * repeats, (group + 1) * repeats):
        at = (row * t.heads + head) * padded
        q, step = rows_of(t, t.q, row, head, own + t.rows)
        for first in range(0, padded, BLOCK):
            begin, count = starts[first] // BLOCK * BLOCK, min(BLOCK, T - first)
            columns = first + BLOCK - begin
            multiply(
                q + 2 * first * step, 2 * step, keys + 4 * begin, turned, scores, 4 * columns, BLOCK, columns, W, 0
            )
            for i in range(BLOCK):
                from_scores, to, kept = scores + 4 * i * columns, weights + 2 * i * columns, 4 * (at + first + i)
                seen, end = starts[first + i] - begin, first + i + 1 - begin
                soften(from_scores, seen, end, columns, t.factor, to, t.tops + kept, t.totals + kept)
            multiply(weights, 2 * columns, values + 2 * begin * W, 4 * W, sums, 4 * W, BLOCK, W, columns, 0)
            for i in range(count):
                y = shorts(start(t.y, row, head), (first + i) * t.y.token, W)
                answer, share = floats(sums, i * W, W), np.float32(1) / floats(t.totals, at + first + i, 1)[0]
                for j in range(W):
                    y[j] = to_bfloat16(answer[j] * share)


@njit(error_model="numpy")
def differentiate(t, own, row, group):  # type: ignore[no-untyped-def]
    """The gradients of one group's keys and values and of its heads' queries."""
    T, W, padded, turned = t.length, t.width, t.padded, 4 * (t.padded + LANES)
    scores, grads, weights, errors = own + t.scores, own + t.grads, own + t.weights, own + t.errors
    inner, paired, flat = own + t.inner, own + t.paired, own + t.flat
    k, step_k = rows_of(t, t.k, row, group, own + t.keys)
    interleave(k, step_k, padded, W, own + t.rows)
    flat_step = 2 * (padded + 2 * LANES)
    transpose(own + t.rows, 4 * W, padded // 2, W, flat, flat_step)  # a pair of keys is a word: (W, padded)
    v, step_v = rows_of(t, t.v, row, group, own + t.values)
    repeats, starts = t.heads // t.groups, starts_of(t, row)
    for repeat in range(repeats):
        head = group * repeats + repeat
        at = (row * t.heads + head) * padded
        q, step = rows_of(t, t.q, row, head, own + t.rows)
        transpose(q, 2 * step, padded, W // 2, own + t.turned_q, turned)
        interleave(q, step, padded, W, own + t.paired_q)
        divide_upstream(t, row, head, own + t.rows, inner)
        transpose(own + t.rows, 2 * W, padded, W // 2, own + t.turned_y, turned)
        interleave(own + t.rows, W, padded, W, own + t.paired_y)
        for key in range(0, padded, PIECE):
            count = min(PIECE, padded - key)
            for query in range(key, padded, PIECE):
                if starts[query] >= key + count:
                    break
                columns = min(PIECE, padded - query)
                wide, narrow, right = 4 * columns, 2 * columns, 4 * query
                multiply(
                    k + 2 * key * step_k, 2 * step_k, own + t.turned_q + right, turned, scores, wide,
                    count, columns, W, 0,
                )  # fmt: skip
                multiply(
                    v + 2 * key * step_v, 2 * step_v, own + t.turned_y + right, turned, grads, wide,
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
                    weights, narrow, own + t.paired_y + 2 * query * W, row_bytes, own + t.v_sums + to, row_bytes,
                    count, W, columns, more,
                )  # fmt: skip
                multiply(
                    errors, narrow, own + t.paired_q + 2 * query * W, row_bytes, own + t.k_sums + to, row_bytes,
                    count, W, columns, more,
                )  # fmt: skip
                multiply(
                    flat + 2 * key, flat_step, paired, wide, own + t.q_sums + right, turned,
                    W, columns, count, key > starts[query],
                )  # fmt: skip
        transpose(own + t.q_sums, turned, W, padded, own + t.q_rows, 4 * W)
        narrow_rows(own + t.q_rows, T, W, t.scale, start(t.q_grad, row, head), t.q_grad.token)
    narrow_rows(own + t.k_sums, T, W, t.scale, start(t.k_grad, row, group), t.k_grad.token)
    narrow_rows(own + t.v_sums, T, W, np.float32(1), start(t.v_grad, row, group), t.v_grad.token)


@njit(error_model="numpy")
def narrow_rows(sums, count, W, scale, to, step):  # type: ignore[no-untyped-def]
    """So many rows of float32 (count, W), times a number, to rows of bfloat16."""
    for token in range(count):
        wide, narrow = floats(sums, token * W, W), shorts(to, token * step, W)
        for i in range(W):
            narrow[i] = to_bfloat16(wide[i] * scale)


@njit(error_model="numpy")
def divide_upstream(t, row, head, rows, inner):  # type: ignore[no-untyped-def]
    """A head's outputs' gradients, divided by their weights' sums, as rows; and what softmax takes off each query's.

    That is the sum of weight times gradient, which is that of output times gradient.
    """
    T, W, padded = t.length, t.width, t.padded
    target, taken = shorts(rows, 0, padded * W), floats(inner, 0, padded)
    totals = floats(t.totals, (row * t.heads + head) * padded, padded)
    for token in range(T):
        share = np.float32(1) / totals[token]
        y = shorts(start(t.y, row, head), token * t.y.token, W)
        upstream = shorts(start(t.y_grad, row, head), token * t.y_grad.token, W)
        taken[token] = dot(upstream, y) * share
        for i in range(W):
            target[token * W + i] = to_bfloat16(from_bfloat16(upstream[i]) * share)
    for i in range(T * W, padded * W):
        target[i] = 0
    for token in range(T, padded):
        taken[token] = 0


@njit(error_model="numpy", inline="always")
def dot(a, b):  # type: ignore[no-untyped-def]
    """The sum of products of two rows of bfloat16."""
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += from_bfloat16(a[i]) * from_bfloat16(b[i])
    return total


@intrinsic
def soften(typing, scores, first, end, columns, factor, weights, top, total):  # type: ignore[no-untyped-def]
    """A query's scores from `first` to `end` become weights 2^(factor * (score - largest)) in bfloat16, others zeros.

    factor times the largest score, and the sum of the rounded weights, go to the addresses `top` and `total`.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        scores, first, end, columns, factor, weights, top, total = arguments
        source, target = pointer(builder, scores, FLOAT), pointer(builder, weights, SHORT)
        limits = [spread(builder, builder.trunc(limit, WORD)) for limit in (first, end)]

        def inside(c):  # type: ignore[no-untyped-def]
            places = numbered(builder, c)
            return builder.and_(
                builder.icmp_signed(">=", places, limits[0]), builder.icmp_signed("<", places, limits[1])
            )

        def larger(a, b):  # type: ignore[no-untyped-def]
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def look(c, tops):  # type: ignore[no-untyped-def]
            return [builder.select(inside(c), larger(load(builder, builder.gep(source, [c])), tops[0]), tops[0])]

        (tops,) = loop(builder, INT(0), columns, LANES, [same(FLOATS, float("-inf"))], look)
        most, scale = builder.fmul(folded(builder, tops, larger), factor), spread(builder, factor)
        below = builder.fneg(spread(builder, most))

        def weigh(c, sums):  # type: ignore[no-untyped-def]
            power = power_of_two(builder, fma(builder, load(builder, builder.gep(source, [c])), scale, below))
            bits = rounded(builder, builder.select(inside(c), power, same(FLOATS, 0.0)))
            store(builder, bits, builder.gep(target, [c]))
            return [builder.fadd(sums[0], widened(builder, bits))]

        (sums,) = loop(builder, INT(0), columns, LANES, [same(FLOATS, 0.0)], weigh)
        builder.store(most, pointer(builder, top, FLOAT))
        builder.store(folded(builder, sums, builder.fadd), pointer(builder, total, FLOAT))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, *[types.int64] * 3), generate


@intrinsic
def weigh_again(typing, scores, grads, columns, key, query, factor, starts, tops, inner, weights, errors, paired):  # type: ignore[no-untyped-def]
    """Scores of two keys with many queries, and their weights' gradients, to weights and the scores' gradients.

    `scores` and `grads` are float32 (2, columns), `weights` and `errors` bfloat16; `paired` is the latter interleaved.
    `starts`, `tops` and `inner` are the queries', from `query` on, who see what lies between their start and them.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        scores, grads, columns, key, query, factor, starts, tops, inner, weights, errors, paired = arguments
        scale = spread(builder, factor)
        keys = [spread(builder, builder.trunc(builder.add(key, INT(row)), WORD)) for row in range(2)]

        def some(c, _):  # type: ignore[no-untyped-def]
            below = builder.fneg(load(builder, pointer(builder, tops, FLOAT, c)))
            taken = load(builder, pointer(builder, inner, FLOAT, c))
            queries, firsts = numbered(builder, builder.add(query, c)), load(builder, pointer(builder, starts, WORD, c))
            halves = []
            for row, place in enumerate((c, builder.add(c, columns))):
                score, grad = (load(builder, pointer(builder, part, FLOAT, place)) for part in (scores, grads))
                power = power_of_two(builder, fma(builder, score, scale, below))
                behind, within = (
                    builder.icmp_signed(*parts) for parts in ((">=", queries, keys[row]), ("<=", firsts, keys[row]))
                )
                seen = builder.and_(behind, within)
                weight = rounded(builder, builder.select(seen, power, same(FLOATS, 0.0)))
                error = rounded(builder, builder.fmul(widened(builder, weight), builder.fsub(grad, taken)))
                store(builder, weight, pointer(builder, weights, SHORT, place))
                store(builder, error, pointer(builder, errors, SHORT, place))
                halves.append(builder.zext(error, WORDS))
            both = builder.or_(halves[0], builder.shl(halves[1], same(WORDS, 16)))
            store(builder, both, pointer(builder, paired, WORD, c))
            return []

        loop(builder, INT(0), columns, LANES, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.float32, *[types.int64] * 6), generate


def numbered(builder: ir.IRBuilder, first: ir.Value) -> ir.Value:
    """The numbers of a vector's lanes, from `first` on."""
    return builder.add(spread(builder, builder.trunc(first, WORD)), ir.Constant(WORDS, list(range(LANES))))


def folded(builder: ir.IRBuilder, vector: ir.Value, join) -> ir.Value:  # type: ignore[no-untyped-def]
    """A vector's lanes joined to one number, in halves."""
    size = LANES
    while size > 1:
        size //= 2
        turned = ir.Constant(WORDS, [(lane + size) % LANES for lane in range(LANES)])
        vector = join(vector, builder.shuffle_vector(vector, vector, turned))
    return builder.extract_element(vector, WORD(0))
