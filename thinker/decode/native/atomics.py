"""How threads meet inside compiled code: atomic words, a spinning barrier, bells, and leaving Python's lock.

One token has some twenty meetings with a few microseconds' work between them. To be woken by the operating system, or a
parallel loop of Numba's, costs as much as that work; watching a word in the other core's cache costs a tenth of a
microsecond. Who the threads are is `team.py`'s business, when they sleep that of `member.py`.
"""

from __future__ import annotations

import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...compiled.memory import pointer
from ...compiled.processor import MACHINE
from .layout import STRIDE

WORD = ir.IntType(64)
PATIENCE = 2_000  # looks at a word, some 100 microseconds, before the processor is offered to others

# LLVM's name for the instruction that tells a processor of a spinning loop, and its argument.
HINTS = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}


@intrinsic
def load(typing, address, index):  # type: ignore[no-untyped-def]
    """Word `index` from the address on, with all that its writer wrote before it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index = arguments
        return builder.load_atomic(pointer(builder, address, WORD, index), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store(typing, address, index, value):  # type: ignore[no-untyped-def]
    """Write word `index`, after all that was written before."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, value = arguments
        builder.store_atomic(value, pointer(builder, address, WORD, index), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def exchange(typing, address, index, expected, new):  # type: ignore[no-untyped-def]
    """If word `index` is as expected, replace it: whether it was."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, expected, new = arguments
        place = pointer(builder, address, WORD, index)
        return builder.extract_value(builder.cmpxchg(place, expected, new, "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typing):  # type: ignore[no-untyped-def]
    """Let a spinning loop rest for an instant."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if MACHINE in HINTS:
            name, values = HINTS[MACHINE]
            operands = [ir.IntType(32)(value) for value in values]
            function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            builder.call(cgutils.get_or_insert_function(builder.module, function, name), operands)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing):  # type: ignore[no-untyped-def]
    """Offer the processor to other threads, where the system has the call."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if sys.platform != "win32":
            function = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def leave_python(typing):  # type: ignore[no-untyped-def]
    """Release Python's lock: what to come back with."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(context.get_python_api(builder).save_thread(), WORD)

    return types.int64(), generate


@intrinsic
def enter_python(typing, state):  # type: ignore[no-untyped-def]
    """Take Python's lock again."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        context.get_python_api(builder).restore_thread(builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def ring(typing, bell):  # type: ignore[no-untyped-def]
    """Wake who sleeps on a bell, one of Python's locks (`team.py`); nobody needs Python's big one for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lock = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [lock.type])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "PyThread_release_lock"), [lock])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def await_ring(typing, bell):  # type: ignore[no-untyped-def]
    """Sleep until the bell rings, or not at all if it has rung since it was awaited last."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lock = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        function = ir.FunctionType(number, [lock.type, number])
        take = cgutils.get_or_insert_function(builder.module, function, "PyThread_acquire_lock")
        builder.call(take, [lock, number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(error_model="numpy")
def barrier(me, threads, address):  # type: ignore[no-untyped-def]
    """Wait until all threads have come here as often as this one. Word 16 t counts the arrivals of thread t."""
    if threads == 1:
        return
    arrivals = load(address, me * STRIDE) + 1
    store(address, me * STRIDE, arrivals)
    for other in range(threads):
        looks = 0
        while load(address, other * STRIDE) < arrivals:
            pause()
            looks += 1
            if looks % PATIENCE == 0:
                give_way()
