"""The one matrix product of native decoding, written as vector instructions.

Numba's loops can't keep a block of sums in registers, so these inner loops are emitted directly: sixteen outputs are
the lanes of a vector, and each lane adds its inputs in one fixed order with fused multiply-adds. What one output is
made of never depends on how many rows or panels a call covers, so neither do its bits. Everything around these loops is
ordinary Numba, in the other kernels.
"""

# R rows, P panels, k inputs; a panel is PANEL outputs side by side: (k, PANEL), and (k / BLOCK, PANEL) for its scales.
# In INT8 the inputs of an output lie together in groups of two or four: (k / GROUP, PANEL, GROUP).

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...compiled.memory import pointer
from ...compiled.processor import DOTS, FETCHED, FETCHING_TURNS, LOW, NEXT_INTO, PAIRS, STREAM, TALL
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
AT_ONCE = 4  # of them are asked for at once, even if that is more than a call's part: a loop by ones costs 4 %
NEAREST = 3  # of the caches, as `fetch` counts them
BROAD = 32 // PANEL  # panels that `LOW` rows take at once


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


def _tile(rows: int, panels: int, dots: bool = DOTS) -> Any:
    """The product of R rows and P panels, R and P fixed: out (R, P PANEL) = x (R, k) times w (P, k, PANEL).

    Each block of 32 inputs is added up by itself, then joined to the sum of those before, which rounds off a third of
    what one long sum does (through SmolLM2's 30 layers: logits as near to float64 as torch's). As `kind` says, w is
    float32, or float16 (keys and values), or Q8_0: then x has been rounded too (`rows.to_int16`), and a block's
    sum is one of integers, exact, and scaled as a whole. Meanwhile, where the processor gains by it, the next weights
    are fetched: for many rows, which use panels over and over in so many `turns`, a part of the next ones in each
    `turn`; and for each block of inputs the next PIECE bytes of those at `ahead`, which is a list of addresses. `dots`
    says how bytes are multiplied, and so how they lie.
    """
    brings = rows == TALL and FETCHED > 0  # long enough with one load that others' come meanwhile
    group, add = (4, _add_fours) if dots else (2, _add_pairs)
    places = [divmod(lane, PANEL) for lane in range(0, panels * PANEL, LANES)]  # panel and lane of each vector
    vectors = len(places)

    @intrinsic
    def tile(typing, x, x_at, x_step, w, w_at, w_step, kind, scales, k, turn, turns, ahead, out, out_at, out_step):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, x_at, x_step, w, w_at, w_step, kind, scales, k, turn, turns, ahead, out, out_at, out_step = arguments
            zeros = [same(FLOATS, 0.0)] * (rows * vectors)

            def x_rows(element):  # type: ignore[no-untyped-def]
                return [pointer(builder, x, element, x_at, builder.mul(x_step, INT(row))) for row in range(rows)]

            def columns(address, element, at, step):  # type: ignore[no-untyped-def]
                starts = [builder.add(builder.mul(step, INT(panel)), INT(lane)) for panel, lane in places]
                return [pointer(builder, address, element, at, start) for start in starts]

            def lines_of(size):  # type: ignore[no-untyped-def]
                """Which lines of a panel's block, of weights of so many bytes, are to be fetched in this turn."""
                count = size * BLOCK * PANEL // CACHE_LINE
                return [builder.sdiv(builder.mul(at, INT(count)), turns) for at in (turn, builder.add(turn, INT(1)))]

            def fetch_weights(starts, lines, j, further, into):  # type: ignore[no-untyped-def]
                """Have those lines fetched of each panel, so many elements behind the block that begins with j."""
                for start, (_, lane) in zip(starts, places, strict=True):
                    if lane == 0:
                        block = builder.gep(start, [builder.add(further, builder.mul(j, INT(PANEL)))])
                        address = builder.bitcast(block, BYTE.as_pointer())

                        def some(line, _, address=address):  # type: ignore[no-untyped-def]
                            place = builder.gep(address, [builder.mul(line, INT(CACHE_LINE))])
                            for following in range(AT_ONCE):
                                fetch(builder, place, following * CACHE_LINE, into)
                            return []

                        loop(builder, lines[0], lines[1], AT_ONCE, [], some)

            def fetch_next(starts, lines, j):  # type: ignore[no-untyped-def]
                """Have those lines fetched of the panels that come next, if there are turns enough."""
                with builder.if_then(builder.icmp_signed(">=", turns, INT(FETCHING_TURNS))):
                    fetch_weights(starts, lines, j, builder.mul(w_step, INT(panels)), NEXT_INTO)

            def fetch_piece(j):  # type: ignore[no-untyped-def]
                """Have fetched what the list has for the block of inputs that begins with j."""
                address = builder.load(pointer(builder, ahead, INT, builder.sdiv(j, INT(BLOCK))))
                for line in range(0, PIECE, CACHE_LINE):
                    fetch(builder, builder.inttoptr(address, BYTE.as_pointer()), line, near=2)

            def end_of(j):  # type: ignore[no-untyped-def]
                """Where the block ends that begins with j."""
                end = builder.add(j, INT(BLOCK))
                return builder.select(builder.icmp_signed("<", end, k), end, k)

            def in_floats(element):  # type: ignore[no-untyped-def]
                starts, inputs, lines = columns(w, element, w_at, w_step), x_rows(FLOAT), lines_of(4)

                def adding(count):  # type: ignore[no-untyped-def]
                    """The products of so many inputs, from j on."""

                    def some(j, sums):  # type: ignore[no-untyped-def]
                        for i in (builder.add(j, INT(further)) for further in range(count)):
                            weights = [
                                load(builder, builder.gep(start, [builder.mul(i, INT(PANEL))])) for start in starts
                            ]
                            if element == SHORT:
                                weights = [from_half(builder, weight) for weight in weights]
                            values = [spread(builder, builder.load(builder.gep(row, [i]))) for row in inputs]
                            pairs = [(weight, value) for value in values for weight in weights]
                            sums = [fma(builder, *pair, total) for pair, total in zip(pairs, sums, strict=True)]
                        return sums

                    return some

                def adding_blocks(end_of, at_once):  # type: ignore[no-untyped-def]
                    """A block's sum joined to those before, so many inputs at once."""

                    def block(j, sums):  # type: ignore[no-untyped-def]
                        if rows > 1 and element == FLOAT:
                            fetch_next(starts, lines, j)
                        if brings:
                            fetch_piece(j)
                        parts = loop(builder, j, end_of(j), at_once, zeros, adding(at_once))
                        return [builder.fadd(total, part) for total, part in zip(sums, parts, strict=True)]

                    return block

                if rows < TALL:
                    return loop(builder, INT(0), k, BLOCK, zeros, adding_blocks(end_of, 1))
                # Written out, a block of eight rows whose weights are far comes up to a sixth sooner (Emerald Rapids).
                whole = builder.and_(k, INT(-BLOCK))
                blocks = adding_blocks(lambda j: builder.add(j, INT(BLOCK)), BLOCK)
                sums = loop(builder, INT(0), whole, BLOCK, zeros, blocks)
                return loop(builder, whole, k, BLOCK, sums, adding_blocks(end_of, 1))

            def in_q8():  # type: ignore[no-untyped-def]
                starts, lines = columns(w, BYTE, w_at, w_step), lines_of(1)
                lanes = [
                    builder.gep(start, [INT(lane * (group - 1))])
                    for start, (_, lane) in zip(starts, places, strict=True)
                ]
                at, step = (builder.sdiv(value, INT(BLOCK)) for value in (w_at, w_step))  # one scale for 32 weights
                halves, inputs, blocks = columns(scales, SHORT, at, step), x_rows(BYTE), builder.sdiv(k, INT(BLOCK))

                def beside(row, kind, place):  # type: ignore[no-untyped-def]
                    """A number that a rounded row has behind its integers."""
                    numbers = builder.bitcast(builder.gep(row, [builder.mul(k, INT(2))]), kind.as_pointer())
                    return spread(builder, builder.load(builder.gep(numbers, [place])))

                def add_group(j, parts, at):  # type: ignore[no-untyped-def]
                    """The products of a group's inputs, j and those behind it, which begin in a row at byte `at`."""
                    further = builder.mul(j, INT(PANEL))
                    weights = [load(builder, builder.gep(lane, [further]), group * LANES) for lane in lanes]
                    words = [builder.bitcast(builder.gep(row, [at]), WORD.as_pointer()) for row in inputs]
                    values = [spread(builder, builder.load(word)) for word in words]
                    return [
                        add(builder, part, weights[i % vectors], values[i // vectors]) for i, part in enumerate(parts)
                    ]

                def add_shorts(j, begin):  # type: ignore[no-untyped-def]
                    """A block's sums, with int16; in a loop: LLVM would sort them by sums, for which registers lack."""

                    def one(j, parts):  # type: ignore[no-untyped-def]
                        return add_group(j, parts, builder.mul(j, INT(2)))

                    return loop(builder, j, end_of(j), group, begin, one)

                def add_bytes(j, begin):  # type: ignore[no-untyped-def]
                    """A block's sums, with bytes: 256 times that of the higher ones and that of the lower ones."""
                    parts = [same(WORDS, 0)] * len(begin)
                    for byte in range(2):
                        if byte == 1:
                            higher = [builder.shl(part, same(WORDS, 8)) for part in parts]
                            parts = [builder.add(*pair) for pair in zip(higher, begin, strict=True)]
                        for at in range(0, BLOCK, group):
                            place = builder.add(builder.mul(j, INT(2)), INT(byte * BLOCK + at))
                            parts = add_group(builder.add(j, INT(at)), parts, place)
                    return parts

                def block(j, sums):  # type: ignore[no-untyped-def]
                    if rows > 1:
                        fetch_next(starts, lines, j)
                    elif panels == 1:
                        fetch_weights(starts, lines, j, INT(STREAM), NEAREST)
                    if brings:
                        fetch_piece(j)
                    place = builder.sdiv(j, INT(BLOCK))
                    begin = [beside(row, WORD, builder.add(blocks, place)) for row in inputs for _ in places]
                    parts = add_bytes(j, begin) if dots else add_shorts(j, begin)
                    scales_at = builder.mul(place, INT(PANEL))
                    factors = [from_half(builder, load(builder, builder.gep(half, [scales_at]))) for half in halves]
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


tall, low = _tile(TALL, 1), _tile(LOW, BROAD)
four_panels, two_panels, one_panel = _tile(1, 4), _tile(1, 2), _tile(1, 1)


def product(x, x_at, x_step, rows, w, w_at, w_step, panels, abreast, kind, scales, k, ahead, out, out_at, out_step):  # type: ignore[no-untyped-def]
    """out[r, PANEL p + lane] = sum over j of x[r, j] * w[p, j, lane]; addresses, places from there, and strides.

    `TALL` rows by one panel fill the registers; the next panel is fetched a part at a time while they do. Of the rows
    that are left, `LOW` at a time take `BROAD` panels. A single row takes several panels `abreast`, so that enough sums
    are on their way to hide how long one addition takes; but weights from beyond the caches come faster as a single
    stream. `ahead` is the thread's list of what to fetch meanwhile. A kernel of its own, whose address the others get
    (`SHAPE`): compiled once, and not into each of its callers.
    """
    blocks, turns = (k + BLOCK - 1) // BLOCK, rows // TALL
    panel = 0
    while panel < panels:
        left = panels - panel
        together = 4 if left >= 4 else 2 if left >= 2 else 1
        if rows == 1:
            together = min(together, abreast)
        for p in range(panel, panel + together):
            from_w, to = w_at + p * w_step, out_at + p * PANEL
            for turn in range(turns):
                from_x, into = x_at + turn * TALL * x_step, to + turn * TALL * out_step
                pieces = take(ahead, blocks)
                tall(x, from_x, x_step, w, from_w, w_step, kind, scales, k, turn, turns, pieces, out, into, out_step)
        done = turns * TALL
        if together % BROAD == 0:
            for p in range(panel, panel + together, BROAD):
                from_w, to = w_at + p * w_step, out_at + p * PANEL
                for row in range(turns * TALL, rows - LOW + 1, LOW):
                    from_x, into = x_at + row * x_step, to + row * out_step
                    turn = min(row, 1)  # the first rows have had the next panels fetched
                    low(x, from_x, x_step, w, from_w, w_step, kind, scales, k, turn, 1, ahead, out, into, out_step)
            done += (rows - done) // LOW * LOW
        for row in range(done, rows):
            from_x, from_w, to = x_at + row * x_step, w_at + panel * w_step, out_at + row * out_step + panel * PANEL
            if together == 4:
                four_panels(x, from_x, x_step, w, from_w, w_step, kind, scales, k, 0, 1, ahead, out, to, out_step)
            elif together == 2:
                two_panels(x, from_x, x_step, w, from_w, w_step, kind, scales, k, 0, 1, ahead, out, to, out_step)
            else:
                one_panel(x, from_x, x_step, w, from_w, w_step, kind, scales, k, 0, 1, ahead, out, to, out_step)
        panel += together
    return 0
