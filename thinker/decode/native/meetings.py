"""How threads meet inside compiled code: a spinning barrier, bells, and leaving Python's lock.

One token has some twenty meetings with a few microseconds' work between them. To be woken by the operating system, or a
parallel loop of Numba's, costs as much as that work; watching a word in the other core's cache costs a tenth of a
microsecond. Who the threads are is `team.py`'s business, when they sleep that of `member.py`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...compiled.atomics import await_value, load, store
from ...compiled.vectors import BYTE, INT, WORD
from .layout import STRIDE


@intrinsic
def leave_python(typing):  # type: ignore[no-untyped-def]
    """Release Python's lock: what to come back with."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(context.get_python_api(builder).save_thread(), INT)

    return types.int64(), generate


@intrinsic
def enter_python(typing, state):  # type: ignore[no-untyped-def]
    """Take Python's lock again."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        context.get_python_api(builder).restore_thread(builder.inttoptr(arguments[0], BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def ring(typing, bell):  # type: ignore[no-untyped-def]
    """Wake who sleeps on a bell, one of Python's locks (`team.py`); nobody needs Python's big one for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lock = builder.inttoptr(arguments[0], BYTE.as_pointer())
        function = ir.FunctionType(ir.VoidType(), [lock.type])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "PyThread_release_lock"), [lock])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def await_ring(typing, bell):  # type: ignore[no-untyped-def]
    """Sleep until the bell rings, or not at all if it has rung since it was awaited last."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lock = builder.inttoptr(arguments[0], BYTE.as_pointer())
        function = ir.FunctionType(WORD, [lock.type, WORD])
        take = cgutils.get_or_insert_function(builder.module, function, "PyThread_acquire_lock")
        builder.call(take, [lock, WORD(1)])
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
        await_value(address, other * STRIDE, arrivals)
