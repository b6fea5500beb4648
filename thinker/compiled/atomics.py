"""Atomic words, by which threads tell each other how far they are while they run compiled code."""

from __future__ import annotations

import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .memory import pointer
from .processor import MACHINE
from .vectors import INT, WORD

PATIENCE = 2_000  # looks at a word, some 100 microseconds, before the processor is offered to others

# LLVM's name for the instruction that tells a processor of a spinning loop, and its argument.
HINTS = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}


@intrinsic
def load(typing, address, index):  # type: ignore[no-untyped-def]
    """Word `index` from the address on, with all that its writer wrote before it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index = arguments
        return builder.load_atomic(pointer(builder, address, INT, index), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store(typing, address, index, value):  # type: ignore[no-untyped-def]
    """Write word `index`, after all that was written before."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, value = arguments
        builder.store_atomic(value, pointer(builder, address, INT, index), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def exchange(typing, address, index, expected, new):  # type: ignore[no-untyped-def]
    """If word `index` is as expected, replace it: whether it was."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, expected, new = arguments
        place = pointer(builder, address, INT, index)
        return builder.extract_value(builder.cmpxchg(place, expected, new, "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def add(typing, address, index, value):  # type: ignore[no-untyped-def]
    """Add to word `index`, before and after all else that its threads do: what it was."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, value = arguments
        return builder.atomic_rmw("add", pointer(builder, address, INT, index), value, "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typing):  # type: ignore[no-untyped-def]
    """Let a spinning loop rest for an instant."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if MACHINE in HINTS:
            name, values = HINTS[MACHINE]
            operands = [WORD(value) for value in values]
            function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing):  # type: ignore[no-untyped-def]
    """Offer the processor to other threads, where the system has the call."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if sys.platform != "win32":
            function = ir.FunctionType(WORD, [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(error_model="numpy")
def await_value(address, index, value):  # type: ignore[no-untyped-def]
    """Until word `index` is at least so much."""
    looks = 0
    while load(address, index) < value:
        pause()
        looks += 1
        if looks % PATIENCE == 0:
            give_way()
