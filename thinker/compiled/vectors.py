"""Vector instructions for the inner loops that Numba's own can't make well: sixteen float32 numbers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from .processor import CONVERTS
from .processor import LANES as LANES  # for those who work with vectors

MAGIC = 1.5 * 2**23  # a number that is added to it is rounded to a whole one, which the last bits then hold

INT, SHORT, BYTE, FLOAT = ir.IntType(64), ir.IntType(16), ir.IntType(8), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
WORD = ir.IntType(32)
WORDS, HALVES = ir.VectorType(WORD, LANES), ir.VectorType(ir.HalfType(), LANES)
Loop = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]
Join = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


def llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call one of LLVM's own functions, by its name behind `llvm.`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int | ir.Value, sums: Sequence[ir.Value], body: Loop
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
    i.add_incoming(builder.add(i, INT(step) if isinstance(step, int) else step), builder.block)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried


def load(builder: ir.IRBuilder, pointer: ir.Value, lanes: int = LANES) -> ir.Value:
    """So many elements in a row, wherever they begin."""
    element = pointer.type.pointee
    value = builder.load(builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer()))
    value.align = element.width // 8 if isinstance(element, ir.IntType) else 4
    return value


def store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    """Write a vector, wherever it begins."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """The same number in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, WORD(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * LANES))


def same(kind: ir.Type, value: float | int) -> ir.Constant:
    """A vector of one known number."""
    return ir.Constant(kind, [value] * LANES)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    return llvm(builder, f"fma.v{LANES}f32", FLOATS, a, b, c)


def larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger of each two numbers."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def folded(builder: ir.IRBuilder, vector: ir.Value, join: Join) -> ir.Value:
    """A vector's lanes joined to one number, in halves."""
    size = LANES
    while size > 1:
        size //= 2
        turned = ir.Constant(WORDS, [(lane + size) % LANES for lane in range(LANES)])
        vector = join(builder, vector, builder.shuffle_vector(vector, vector, turned))
    return builder.extract_element(vector, WORD(0))


def from_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Float16 bits as float32, exactly; no infinity."""
    if CONVERTS:
        return builder.fpext(builder.bitcast(half, HALVES), FLOATS)
    # Exponent and mantissa move to their places in float32, whose exponent counts from 127 and not from 15.
    bits = builder.sext(half, WORDS)
    sign, rest = (builder.and_(bits, same(WORDS, mask)) for mask in (-(1 << 31), (1 << 15) - 1))
    moved = builder.bitcast(builder.shl(rest, same(WORDS, 13)), FLOATS)
    magnitude = builder.bitcast(builder.fmul(moved, same(FLOATS, 2.0**112)), WORDS)
    return builder.bitcast(builder.or_(magnitude, sign), FLOATS)


def fetch(builder: ir.IRBuilder, pointer: ir.Value, ahead: int, near: int = 3) -> None:
    """Ask for the cache line so many bytes further, which may lie beyond the array: nothing is read.

    near: into all caches with 3, all but the first with 2.
    """
    switches = [WORD(value) for value in (0, near, 1)]  # to be read, where to, data
    llvm(builder, "prefetch.p0", ir.VoidType(), builder.gep(pointer, [INT(ahead)]), *switches)
