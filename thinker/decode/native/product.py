"""The one matrix product of native decoding, written as vector instructions.

Numba's loops can't keep a block of sums in registers, so these inner loops are emitted directly: sixteen outputs are
the lanes of a vector, and each lane adds its inputs in one fixed order with fused multiply-adds. What one output is
made of never depends on how many rows or panels a call covers, so neither do its bits. Everything around these loops is
ordinary Numba, in the other kernels.
"""

# R rows, P panels, k inputs; a panel is PANEL outputs side by side: (k, PANEL), and (k / BLOCK, PANEL) for its scales.
# In INT8 the inputs of an output lie together in groups of two or four: (k / GROUP, PANEL, GROUP).

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...compiled.memory import pointer
from ...compiled.processor import DOTS, LOW, PAIRS, TALL, WIDE
from ...compiled.vectors import (
    BYTE,
    FLOAT,
    FLOATS,
    INT,
    LANES,
    SHORT,
    WORD,
    WORDS,
    fetch,
    fma,
    from_half,
    llvm,
    load,
    loop,
    same,
    spread,
    store,
)
from .ahead import take
from .layout import BLOCK, FLOAT16, PANEL, PIECE, Q8

CACHE_LINE = 64  # bytes
STREAM = 8192  # bytes that a stream of weights is asked for ahead
# What fits into the registers beside each other: so many outputs of `TALL` rows, or so many panels of one row.
BESIDE, ABREAST = (PANEL, 4) if WIDE else (PANEL // 2, 2)


def _add_fours(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, values: ir.Value) -> ir.Value:
    """total + the sum of four products in each lane, of bytes without a sign and bytes with one; exact."""
    return llvm(builder, "x86.avx512.vpdpbusd.512", WORDS, total, builder.bitcast(weights, WORDS), values)


def _add_pairs(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, values: ir.Value) -> ir.Value:
    """total + the sum of two products in each lane, of bytes without a sign and int16; exact."""
    shorts, words = (ir.VectorType(kind, 2 * LANES) for kind in (SHORT, WORD))
    weights, values = builder.zext(weights, shorts), builder.bitcast(values, shorts)
    if PAIRS:
        half, sums = ir.VectorType(WORD, LANES // 2), []
        for start in (0, LANES):
            places = ir.Constant(WORDS, list(range(start, start + LANES)))
            parts = (builder.shuffle_vector(v, v, places) for v in (weights, values))
            sums.append(llvm(builder, "x86.avx2.pmadd.wd", half, *parts))
        both = builder.shuffle_vector(*sums, ir.Constant(WORDS, list(range(LANES))))
        return builder.add(total, both)
    products = builder.mul(builder.sext(weights, words), builder.sext(values, words))
    for start in range(2):
        every = ir.Constant(WORDS, list(range(start, 2 * LANES, 2)))
        total = builder.add(total, builder.shuffle_vector(products, products, every))
    return total


def _tile(rows: int, outputs: int, dots: bool = DOTS) -> Any:
    """The product of R rows and P panels, R and P fixed: out (R, 32 P) = x (R, k) times w (P, k, 32).

    `outputs` is 32 P, or less than a panel: then `first` is the place in it.

    Each block of 32 inputs is added up by itself, then joined to the sum of those before, which rounds off a third of
    what one long sum does (through SmolLM2's 30 layers: logits as near to float64 as torch's). As `kind` says, w is
    float32, or float16 (keys and values), or Q8_0: then x has been rounded too (`rows.to_int16`), and a block's
    sum is one of integers, exact, and scaled as a whole. Meanwhile the next weights are fetched if `asks` says so: for
    many rows, which use a panel over and over, all of the next panel; and for each block of inputs the next PIECE bytes
    of those at `ahead`, which is a list of addresses. `dots` says how bytes are multiplied, and so how they lie.
    """
    busy = rows == TALL  # long enough with one load that others' come meanwhile
    group, add = (4, _add_fours) if dots else (2, _add_pairs)
    places = [divmod(lane, PANEL) for lane in range(0, outputs, LANES)]  # panel and lane of each vector
    vectors = len(places)

    @intrinsic
    def tile(typing, x, x_at, x_step, w, w_at, w_step, first, kind, scales, k, asks, ahead, out, out_at, out_step):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, x_at, x_step, w, w_at, w_step, first, kind, scales, k, asks, ahead, out, out_at, out_step = arguments
            asking = builder.icmp_signed("!=", asks, INT(0))
            zeros = [same(FLOATS, 0.0)] * (rows * vectors)

            def x_rows(element):  # type: ignore[no-untyped-def]
                return [pointer(builder, x, element, x_at, builder.mul(x_step, INT(row))) for row in range(rows)]

            def columns(address, element, at, step):  # type: ignore[no-untyped-def]
                at = builder.add(at, first)
                starts = [builder.add(builder.mul(step, INT(panel)), INT(lane)) for panel, lane in places]
                return [pointer(builder, address, element, at, start) for start in starts]

            def ask(column, j, further, count):  # type: ignore[no-untyped-def]
                """Have the weights fetched that lie `further` elements behind those of `count` inputs from j on."""
                place = builder.gep(column, [builder.add(further, builder.mul(j, INT(PANEL)))])
                for line in range(0, count * PANEL * (1 if column.type.pointee == BYTE else 4), CACHE_LINE):
                    fetch(builder, builder.bitcast(place, BYTE.as_pointer()), line)

            def piece_for(j):  # type: ignore[no-untyped-def]
                """What to have fetched during the block of inputs that begins with j."""
                address = builder.load(pointer(builder, ahead, INT, builder.sdiv(j, INT(BLOCK))))
                return builder.inttoptr(address, BYTE.as_pointer())

            def in_floats(element):  # type: ignore[no-untyped-def]
                starts, inputs = columns(w, element, w_at, w_step), x_rows(FLOAT)

                def one(j, sums, begin, piece):  # type: ignore[no-untyped-def]
                    if busy:
                        line = builder.mul(builder.sub(j, begin), INT(PIECE // BLOCK))
                        fetch(builder, builder.gep(piece, [line]), 0, near=2)
                    if rows > 1 and element == FLOAT:
                        with builder.if_then(asking):
                            ask(starts[0], j, w_step, 1)
                    weights = [load(builder, builder.gep(start, [builder.mul(j, INT(PANEL))])) for start in starts]
                    if element == SHORT:
                        weights = [from_half(builder, weight) for weight in weights]
                    values = [spread(builder, builder.load(builder.gep(row, [j]))) for row in inputs]
                    return [fma(builder, weights[i % vectors], values[i // vectors], sums[i]) for i in range(len(sums))]

                def block(j, sums):  # type: ignore[no-untyped-def]
                    end = builder.add(j, INT(BLOCK))
                    end = builder.select(builder.icmp_signed("<", end, k), end, k)
                    one_more = partial(one, begin=j, piece=piece_for(j) if busy else None)
                    parts = loop(builder, j, end, 1, zeros, one_more)
                    return [builder.fadd(total, part) for total, part in zip(sums, parts, strict=True)]

                return loop(builder, INT(0), k, BLOCK, zeros, block)

            def in_q8():  # type: ignore[no-untyped-def]
                lanes = [
                    builder.gep(start, [builder.mul(builder.add(first, INT(lane)), INT(group - 1))])
                    for start, (_, lane) in zip(columns(w, BYTE, w_at, w_step), places, strict=True)
                ]
                # One scale for 32 weights, in their order: those of a block of inputs take PANEL = BLOCK places.
                at, step = (builder.sdiv(value, INT(BLOCK)) for value in (w_at, w_step))
                halves, inputs, blocks = columns(scales, SHORT, at, step), x_rows(BYTE), builder.sdiv(k, INT(BLOCK))

                def beside(row, kind, place):  # type: ignore[no-untyped-def]
                    """A number that a rounded row has behind its integers."""
                    numbers = builder.bitcast(builder.gep(row, [builder.mul(k, INT(2))]), kind.as_pointer())
                    return spread(builder, builder.load(builder.gep(numbers, [place])))

                def block(j, sums):  # type: ignore[no-untyped-def]
                    if rows > 1 or outputs == PANEL:
                        with builder.if_then(asking):
                            ask(lanes[0], j, w_step if rows > 1 else INT(STREAM), BLOCK)
                    place = builder.sdiv(j, INT(BLOCK))
                    piece, lines = piece_for(j) if busy else None, iter(range(0, PIECE, CACHE_LINE))
                    begin = [beside(row, WORD, builder.add(blocks, place)) for row in inputs]
                    parts = [same(WORDS, 0) if dots else begin[i // vectors] for i in range(len(sums))]
                    for byte in range(2 if dots else 1):
                        if byte == 1:
                            higher = [builder.shl(part, same(WORDS, 8)) for part in parts]
                            parts = [builder.add(part, begin[i // vectors]) for i, part in enumerate(higher)]
                        for at in range(0, BLOCK, group):
                            further = [builder.mul(builder.add(j, INT(at)), INT(PANEL))]
                            weights = [load(builder, builder.gep(lane, further), group * LANES) for lane in lanes]
                            begun = builder.add(builder.mul(j, INT(2)), INT(byte * BLOCK + at if dots else 2 * at))
                            words = [builder.bitcast(builder.gep(row, [begun]), WORD.as_pointer()) for row in inputs]
                            values = [spread(builder, builder.load(word)) for word in words]
                            for line in islice(lines, 2 if busy else 0):
                                fetch(builder, piece, line, near=2)
                            parts = [
                                add(builder, part, weights[i % vectors], values[i // vectors])
                                for i, part in enumerate(parts)
                            ]
                    factors = [from_half(builder, load(builder, builder.gep(half, [j]))) for half in halves]
                    steps = [beside(row, FLOAT, place) for row in inputs]
                    both = [builder.fmul(factors[i % vectors], steps[i // vectors]) for i in range(len(sums))]
                    wholes = [builder.sitofp(part, FLOATS) for part in parts]
                    return [fma(builder, *triple) for triple in zip(wholes, both, sums, strict=True)]

                return loop(builder, INT(0), k, BLOCK, zeros, block)

            def keep(sums):  # type: ignore[no-untyped-def]
                for i, total in enumerate(sums):
                    row, vector = divmod(i, vectors)
                    place = pointer(builder, out, FLOAT, out_at, builder.mul(out_step, INT(row)), INT(vector * LANES))
                    store(builder, total, place)

            with builder.if_else(builder.icmp_signed("==", kind, INT(Q8))) as (then, otherwise):
                with then:
                    keep(in_q8())
                with otherwise, builder.if_else(builder.icmp_signed("==", kind, INT(FLOAT16))) as (half, whole):
                    with half:
                        keep(in_floats(SHORT))
                    with whole:
                        keep(in_floats(FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 15), generate

    return tile


tall, low = _tile(TALL, BESIDE), _tile(LOW, PANEL)
four_panels, two_panels, one_panel = _tile(1, 4 * PANEL), _tile(1, 2 * PANEL), _tile(1, PANEL)


def product(x, x_at, x_step, rows, w, w_at, w_step, panels, abreast, kind, scales, k, ahead, out, out_at, out_step):  # type: ignore[no-untyped-def]
    """out[r, 32 p + lane] = sum over j of x[r, j] * w[p, j, lane]; addresses, places from there, and strides.

    `TALL` rows by one panel fill the registers; of several such blocks only the last has the next panel fetched, since
    to ask costs a fifth of a block's time. A single row takes several panels `abreast`, so that enough sums are on
    their way to hide how long one addition takes; but weights from beyond the caches come faster as a single stream.
    `ahead` is the thread's list of what to fetch meanwhile. A kernel of its own, whose address the others get
    (`SHAPE`): compiled once, and not into each of its callers.
    """
    blocks = (k + BLOCK - 1) // BLOCK
    panel = 0
    while panel < panels:
        left = panels - panel
        together = min(abreast, ABREAST if left >= ABREAST else 2 if left >= 2 else 1)
        row = 0
        if rows >= LOW:
            for p in range(panel, panel + together):
                from_w, to = w_at + p * w_step, out_at + p * PANEL
                for part in range(0, PANEL, BESIDE):
                    row = 0
                    while row + TALL <= rows:
                        from_x, into = x_at + row * x_step, to + row * out_step + part
                        last, pieces = row + 2 * TALL > rows, take(ahead, blocks)
                        tall(
                            x, from_x, x_step, w, from_w, w_step, part, kind, scales, k, last, pieces,
                            out, into, out_step,
                        )  # fmt: skip
                        row += TALL
                while row + LOW <= rows:
                    from_x, into = x_at + row * x_step, to + row * out_step
                    low(x, from_x, x_step, w, from_w, w_step, 0, kind, scales, k, True, ahead, out, into, out_step)
                    row += LOW
        for r in range(row, rows):
            from_x, from_w, to = x_at + r * x_step, w_at + panel * w_step, out_at + r * out_step + panel * PANEL
            if together == 4:
                four_panels(x, from_x, x_step, w, from_w, w_step, 0, kind, scales, k, True, ahead, out, to, out_step)
            elif together == 2:
                two_panels(x, from_x, x_step, w, from_w, w_step, 0, kind, scales, k, True, ahead, out, to, out_step)
            else:
                one_panel(x, from_x, x_step, w, from_w, w_step, 0, kind, scales, k, True, ahead, out, to, out_step)
        panel += together
    return 0


@intrinsic
def call(  # type: ignore[no-untyped-def]
    typing,
    address,
    x,
    x_at,
    x_step,
    rows,
    w,
    w_at,
    w_step,
    panels,
    abreast,
    kind,
    scales,
    k,
    ahead,
    out,
    out_at,
    out_step,
):
    """Call `product` at its address, as Numba does: with places for its result and for an error, which has none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        places = [cgutils.alloca_once(builder, INT), cgutils.alloca_once(builder, BYTE.as_pointer())]
        function = ir.FunctionType(WORD, [*(place.type for place in places), *[INT] * 16])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [*places, *arguments[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 17), generate
