"""What attention does to a row of numbers, or two, between products: written as vector instructions.

Arguments are addresses; counts are multiples of a vector's sixteen lanes.
"""

from __future__ import annotations

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
    WORD,
    WORDS,
    fma,
    folded,
    larger,
    load,
    loop,
    same,
    spread,
    store,
)
from .numbers import Numbers


def turning(numbers: Numbers, back: bool) -> Any:
    """RoPE for a row whose two halves turn together: see `attention.rotate`."""

    @intrinsic
    def turned(typing, source, width, cos, to_sin, factor, target):  # type: ignore[no-untyped-def]
        """A row, times a number, turned on, or back (of float32).

        The sines lie so many bytes behind the cosines.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            source, width, cos, to_sin, factor, target = arguments
            scale, half = spread(builder, factor), builder.sdiv(width, INT(2))

            def at(place):  # type: ignore[no-untyped-def]
                if back:
                    return load(builder, pointer(builder, source, FLOAT, place))
                return numbers.read(builder, source, place)

            def some(c, _):  # type: ignore[no-untyped-def]
                other = builder.add(c, half)
                a, b = at(c), at(other)
                cosine = load(builder, pointer(builder, cos, FLOAT, c))
                sine = load(builder, pointer(builder, builder.add(cos, to_sin), FLOAT, c))
                sine = builder.fneg(sine) if back else sine
                first = builder.fsub(builder.fmul(a, cosine), builder.fmul(b, sine))
                second = builder.fadd(builder.fmul(b, cosine), builder.fmul(a, sine))
                for value, place in ((first, c), (second, other)):
                    numbers.write(builder, builder.fmul(value, scale), target, place)
                return []

            loop(builder, INT(0), half, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, types.int64), generate

    return turned


def dividing(numbers: Numbers) -> Any:
    """For an output's gradients."""

    @intrinsic
    def divided(typing, upstream, y, width, share, target, inner):  # type: ignore[no-untyped-def]
        """A row of gradients times a number, and its product with another row, times that number as well."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            upstream, y, width, share, target, inner = arguments
            scale = spread(builder, share)

            def some(c, sums):  # type: ignore[no-untyped-def]
                grad, other = (numbers.read(builder, x, c) for x in (upstream, y))
                numbers.write(builder, builder.fmul(grad, scale), target, c)
                return [fma(builder, grad, other, sums[0])]

            (sums,) = loop(builder, INT(0), width, LANES, [same(FLOATS, 0.0)], some)
            total = builder.fmul(folded(builder, sums, ir.IRBuilder.fadd), share)
            builder.store(total, pointer(builder, inner, FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3, types.float32, *[types.int64] * 2), generate

    return divided


def softening(numbers: Numbers) -> Any:
    """For a query's scores."""

    @intrinsic
    def soften(typing, scores, first, end, columns, factor, weights, top, total):  # type: ignore[no-untyped-def]
        """A query's scores from `first` to `end` become weights 2^(factor * (score - largest)), others zeros.

        factor times the largest score, and the sum of the rounded weights, go to the addresses `top` and `total`.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            scores, first, end, columns, factor, weights, top, total = arguments
            source, target = pointer(builder, scores, FLOAT), pointer(builder, weights, numbers.element)
            limits = [spread(builder, builder.trunc(limit, WORD)) for limit in (first, end)]

            def inside(c):  # type: ignore[no-untyped-def]
                places = numbered(builder, c)
                return builder.and_(
                    builder.icmp_signed(">=", places, limits[0]), builder.icmp_signed("<", places, limits[1])
                )

            def look(c, tops):  # type: ignore[no-untyped-def]
                most = larger(builder, load(builder, builder.gep(source, [c])), tops[0])
                return [builder.select(inside(c), most, tops[0])]

            (tops,) = loop(builder, INT(0), columns, LANES, [same(FLOATS, float("-inf"))], look)
            most, scale = builder.fmul(folded(builder, tops, larger), factor), spread(builder, factor)
            below = builder.fneg(spread(builder, most))

            def weigh(c, sums):  # type: ignore[no-untyped-def]
                power = numbers.power_of_two(
                    builder, fma(builder, load(builder, builder.gep(source, [c])), scale, below)
                )
                bits = numbers.rounded(builder, builder.select(inside(c), power, same(FLOATS, 0.0)))
                store(builder, bits, builder.gep(target, [c]))
                return [builder.fadd(sums[0], numbers.widened(builder, bits))]

            (sums,) = loop(builder, INT(0), columns, LANES, [same(FLOATS, 0.0)], weigh)
            builder.store(most, pointer(builder, top, FLOAT))
            builder.store(folded(builder, sums, ir.IRBuilder.fadd), pointer(builder, total, FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, *[types.int64] * 3), generate

    return soften


def weighing(numbers: Numbers) -> Any:
    """The same again, for two keys, on the way back."""

    @intrinsic
    def weigh_again(typing, scores, grads, columns, key, query, factor, starts, tops, inner, weights, errors, paired):  # type: ignore[no-untyped-def]
        """Scores of two keys with many queries, and their weights' gradients, to weights and the scores' gradients.

        `scores` and `grads` are float32 (2, columns); `paired` is `errors` interleaved, where pairs are multiplied.
        `starts`, `tops` and `inner` are the queries', from `query` on, who see what lies between their start and them.
        """

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            scores, grads, columns, key, query, factor, starts, tops, inner, weights, errors, paired = arguments
            scale = spread(builder, factor)
            keys = [spread(builder, builder.trunc(builder.add(key, INT(row)), WORD)) for row in range(2)]

            def some(c, _):  # type: ignore[no-untyped-def]
                below = builder.fneg(load(builder, pointer(builder, tops, FLOAT, c)))
                taken = load(builder, pointer(builder, inner, FLOAT, c))
                queries, firsts = (
                    numbered(builder, builder.add(query, c)),
                    load(builder, pointer(builder, starts, WORD, c)),
                )
                errors_of_both = []
                for row, place in enumerate((c, builder.add(c, columns))):
                    score, grad = (load(builder, pointer(builder, part, FLOAT, place)) for part in (scores, grads))
                    power = numbers.power_of_two(builder, fma(builder, score, scale, below))
                    begun = builder.icmp_signed("<=", firsts, keys[row])
                    seen = builder.and_(begun, builder.icmp_signed("<=", keys[row], queries))
                    weight = numbers.rounded(builder, builder.select(seen, power, same(FLOATS, 0.0)))
                    error = numbers.rounded(
                        builder, builder.fmul(numbers.widened(builder, weight), builder.fsub(grad, taken))
                    )
                    store(builder, weight, pointer(builder, weights, numbers.element, place))
                    store(builder, error, pointer(builder, errors, numbers.element, place))
                    errors_of_both.append(error)
                if numbers.size == 2:
                    first, second = (builder.zext(error, WORDS) for error in errors_of_both)
                    both = builder.or_(first, builder.shl(second, same(WORDS, 16)))
                    store(builder, both, pointer(builder, paired, WORD, c))
                return []

            loop(builder, INT(0), columns, LANES, [], some)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32, *[types.int64] * 6), generate

    return weigh_again


def numbered(builder: ir.IRBuilder, first: ir.Value) -> ir.Value:
    """The numbers of a vector's lanes, from `first` on."""
    return builder.add(spread(builder, builder.trunc(first, WORD)), ir.Constant(WORDS, list(range(LANES))))
