"""The one matrix product of native decoding, and two sums over a row, written as vector instructions.

Numba's loops can't keep a block of sums in registers, so these inner loops are emitted directly: sixteen outputs are
the lanes of a vector, and each lane adds its inputs in one fixed order with fused multiply-adds. What one output is
made of never depends on how many rows or panels a call covers, so neither do its bits. LLVM splits the vectors on
processors with narrower registers. Everything around these loops is ordinary Numba, in the other kernels.
"""

# R rows, P panels, k inputs; a panel is PANEL outputs side by side: (k, PANEL), and (k / BLOCK, PANEL) for its scales

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...compiled.memory import pointer
from .atomics import MACHINE
from .layout import FLOAT16, PANEL, Q8

LANES = 16  # float32 in one vector
BLOCK = 32  # inputs whose products are added up by themselves; in INT8 they share a scale
CACHE_LINE = 64  # bytes
STREAM = 8192  # bytes that a stream of weights is asked for ahead

INT, SHORT, BYTE, FLOAT = ir.IntType(64), ir.IntType(16), ir.IntType(8), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS, HALVES = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.HalfType(), LANES)
# Older processors lack the instruction that makes float32 of float16.
CONVERTS = MACHINE == "aarch64" or binding.get_host_cpu_features().get("f16c", False)
Loop = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def _loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, sums: Sequence[ir.Value], body: Loop
) -> list:
    """for i in range(start, stop, step): sums = body(i, sums); with sums held in registers."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(INT)
    i.add_incoming(start, before)
    carried = []
    for value in sums:
        carried.append(builder.phi(value.type))
        carried[-1].add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", i, stop), inside, after)
    builder.position_at_end(inside)
    results = body(i, carried)
    i.add_incoming(builder.add(i, INT(step)), builder.block)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried


def _load(builder: ir.IRBuilder, pointer: ir.Value, lanes: int = LANES) -> ir.Value:
    element = pointer.type.pointee
    value = builder.load(builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer()))
    value.align = element.width // 8 if isinstance(element, ir.IntType) else 4
    return value


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """The same number in every lane."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * LANES))


def _same(kind: ir.Type, value: float | int) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), name), [a, b, c]
    )


def _fetch(builder: ir.IRBuilder, pointer: ir.Value, ahead: int) -> None:
    """Ask for the cache line so many bytes further, which may lie beyond the array: nothing is read."""
    switches = [ir.IntType(32)(value) for value in (0, 3, 1)]  # to be read, soon again, data
    kinds = [BYTE.as_pointer(), *(switch.type for switch in switches)]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0")
    builder.call(function, [builder.gep(pointer, [INT(ahead)]), *switches])


def _from_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Float16 bits as float32, exactly; no infinity."""
    if CONVERTS:
        return builder.fpext(builder.bitcast(half, HALVES), FLOATS)
    # Exponent and mantissa move to their places in float32, whose exponent counts from 127 and not from 15.
    bits = builder.sext(half, WORDS)
    sign, rest = (builder.and_(bits, _same(WORDS, mask)) for mask in (-(1 << 31), (1 << 15) - 1))
    moved = builder.bitcast(builder.shl(rest, _same(WORDS, 13)), FLOATS)
    magnitude = builder.bitcast(builder.fmul(moved, _same(FLOATS, 2.0**112)), WORDS)
    return builder.bitcast(builder.or_(magnitude, sign), FLOATS)


def _tile(rows: int, panels: int) -> Any:
    """The product of R rows and P panels, for fixed R and P: out (R, 32 P) = x (R, k) times w (P, k, 32).

    Each block of 32 inputs is added up by itself, then joined to the sum of those before, which rounds off a third of
    what one long sum does (through SmolLM2's 30 layers: logits as near to float64 as torch's). As `kind`
    says, w is float32, or float16 (keys and values), or Q8_0, where the block's sum is scaled as a whole. Meanwhile the
    next weights are fetched: for many rows, which use a panel over and over, all of the next panel.
    """
    places = [divmod(lane, PANEL) for lane in range(0, panels * PANEL, LANES)]  # panel and lane of each vector
    vectors = len(places)

    @intrinsic
    def tile(typing, x, x_at, x_step, w, w_at, w_step, kind, scales, k, out, out_at, out_step):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            x, x_at, x_step, w, w_at, w_step, kind, scales, k, out, out_at, out_step = arguments
            zeros = [_same(FLOATS, 0.0)] * (rows * vectors)
            x_rows = [pointer(builder, x, FLOAT, x_at, builder.mul(x_step, INT(row))) for row in range(rows)]

            def columns(address, element, at, step):  # type: ignore[no-untyped-def]
                starts = [builder.add(builder.mul(step, INT(panel)), INT(lane)) for panel, lane in places]
                return [pointer(builder, address, element, at, start) for start in starts]

            def ask(column, j, further, count):  # type: ignore[no-untyped-def]
                """Have the weights fetched that lie `further` elements behind those of `count` inputs from j on."""
                place = builder.gep(column, [builder.add(further, builder.mul(j, INT(PANEL)))])
                for line in range(0, count * PANEL * (1 if column.type.pointee == BYTE else 4), CACHE_LINE):
                    _fetch(builder, builder.bitcast(place, BYTE.as_pointer()), line)

            def products(columns, j, sums):  # type: ignore[no-untyped-def]
                weights = [_load(builder, builder.gep(column, [builder.mul(j, INT(PANEL))])) for column in columns]
                if weights[0].type.element == BYTE:
                    weights = [builder.sitofp(builder.sext(weight, WORDS), FLOATS) for weight in weights]
                if weights[0].type.element == SHORT:
                    weights = [_from_half(builder, weight) for weight in weights]
                values = [_spread(builder, builder.load(builder.gep(row, [j]))) for row in x_rows]
                return [
                    _fma(builder, weights[i % vectors], values[i // vectors], total) for i, total in enumerate(sums)
                ]

            def in_floats(element):  # type: ignore[no-untyped-def]
                weights = columns(w, element, w_at, w_step)

                def one(j, sums):  # type: ignore[no-untyped-def]
                    if rows > 1 and element == FLOAT:
                        ask(weights[0], j, w_step, 1)
                    return products(weights, j, sums)

                def block(j, sums):  # type: ignore[no-untyped-def]
                    end = builder.add(j, INT(BLOCK))
                    end = builder.select(builder.icmp_signed("<", end, k), end, k)
                    parts = _loop(builder, j, end, 1, zeros, one)
                    return [builder.fadd(total, part) for total, part in zip(sums, parts, strict=True)]

                return _loop(builder, INT(0), k, BLOCK, zeros, block)

            def in_q8():  # type: ignore[no-untyped-def]
                weights = columns(w, BYTE, w_at, w_step)
                # One scale for 32 weights, in their order: those of a block of inputs take PANEL = BLOCK places.
                at, step = (builder.sdiv(value, INT(BLOCK)) for value in (w_at, w_step))
                halves = columns(scales, SHORT, at, step)

                def block(j, sums):  # type: ignore[no-untyped-def]
                    if rows > 1 or panels == 1:
                        ask(weights[0], j, w_step if rows > 1 else INT(STREAM), BLOCK)
                    end = builder.add(j, INT(BLOCK))
                    parts = _loop(builder, j, end, 1, zeros, lambda i, sums: products(weights, i, sums))
                    factors = [_from_half(builder, _load(builder, builder.gep(column, [j]))) for column in halves]
                    return [_fma(builder, part, factors[i % vectors], sums[i]) for i, part in enumerate(parts)]

                return _loop(builder, INT(0), k, BLOCK, zeros, block)

            def keep(sums):  # type: ignore[no-untyped-def]
                for i, total in enumerate(sums):
                    row, vector = divmod(i, vectors)
                    place = pointer(builder, out, FLOAT, out_at, builder.mul(out_step, INT(row)), INT(vector * LANES))
                    _store(builder, total, place)

            with builder.if_else(builder.icmp_signed("==", kind, INT(Q8))) as (then, otherwise):
                with then:
                    keep(in_q8())
                with otherwise, builder.if_else(builder.icmp_signed("==", kind, INT(FLOAT16))) as (half, whole):
                    with half:
                        keep(in_floats(SHORT))
                    with whole:
                        keep(in_floats(FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate

    return tile


eight_rows, four_rows = _tile(8, 1), _tile(4, 1)
four_panels, two_panels, one_panel = _tile(1, 4), _tile(1, 2), _tile(1, 1)


def product(x, x_at, x_step, rows, w, w_at, w_step, panels, abreast, kind, scales, k, out, out_at, out_step):  # type: ignore[no-untyped-def]
    """out[r, 32 p + lane] = sum over j of x[r, j] * w[p, j, lane]; addresses, places from there, and strides.

    Eight rows by one panel fill the registers. A single row takes up to four panels `abreast`, so that enough sums are
    on their way to hide how long one addition takes; but weights from beyond the caches come faster as a single stream.
    A kernel of its own, whose address the others get (`SHAPE`): compiled once, and not into each of its callers.
    """
    panel = 0
    while panel < panels:
        together = min(abreast, 4 if panel + 4 <= panels else 2 if panel + 2 <= panels else 1)
        row = 0
        if rows >= 4:
            for p in range(panel, panel + together):
                row, from_x, from_w, to = 0, x_at, w_at + p * w_step, out_at + p * PANEL
                while row + 8 <= rows:
                    eight_rows(x, from_x, x_step, w, from_w, w_step, kind, scales, k, out, to, out_step)
                    row, from_x, to = row + 8, from_x + 8 * x_step, to + 8 * out_step
                if row + 4 <= rows:
                    four_rows(x, from_x, x_step, w, from_w, w_step, kind, scales, k, out, to, out_step)
                    row += 4
        for r in range(row, rows):
            from_x, from_w, to = x_at + r * x_step, w_at + panel * w_step, out_at + r * out_step + panel * PANEL
            if together == 4:
                four_panels(x, from_x, x_step, w, from_w, w_step, kind, scales, k, out, to, out_step)
            elif together == 2:
                two_panels(x, from_x, x_step, w, from_w, w_step, kind, scales, k, out, to, out_step)
            else:
                one_panel(x, from_x, x_step, w, from_w, w_step, kind, scales, k, out, to, out_step)
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
    out,
    out_at,
    out_step,
):
    """Call `product` at its address, as Numba does: with places for its result and for an error, which has none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        places = [cgutils.alloca_once(builder, INT), cgutils.alloca_once(builder, BYTE.as_pointer())]
        function = ir.FunctionType(ir.IntType(32), [*(place.type for place in places), *[INT] * 15])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [*places, *arguments[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 16), generate


def _add(builder: ir.IRBuilder, value: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(value, total)


def _add_square(builder: ir.IRBuilder, value: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(value, value), total)


def _larger(builder: ir.IRBuilder, value: ir.Value, other: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", value, other), value, other)


def _fold(start: float, take: Callable[..., ir.Value], join: Callable[..., ir.Value]) -> Any:
    """A row folded to one number: sixteen results over every sixteenth element, joined in pairs, then the leftover."""

    @intrinsic
    def fold(typing, x):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            row = context.make_array(signature.args[0])(context, builder, arguments[0])
            whole = builder.sub(row.nitems, builder.srem(row.nitems, INT(LANES)))

            def take_lanes(i, results):  # type: ignore[no-untyped-def]
                return [take(builder, _load(builder, builder.gep(row.data, [i])), results[0])]

            def take_one(i, results):  # type: ignore[no-untyped-def]
                return [take(builder, builder.load(builder.gep(row.data, [i])), results[0])]

            (lanes,) = _loop(builder, INT(0), whole, LANES, [_same(FLOATS, start)], take_lanes)
            results = [builder.extract_element(lanes, ir.IntType(32)(lane)) for lane in range(LANES)]
            while len(results) > 1:
                results = [join(builder, a, b) for a, b in zip(results[::2], results[1::2], strict=True)]
            return _loop(builder, whole, row.nitems, 1, results, take_one)[0]

        return types.float32(x), generate

    return fold


sum_of = _fold(0.0, _add, _add)
sum_of_squares = _fold(0.0, _add_square, _add)
largest = _fold(float("-inf"), _larger, _larger)
