"""How a kernel is run by all of torch's threads at once: OpenMP's own call, as compiled loops of torch make it."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled.vectors import BYTE, INT, WORD


def fork(parallel, number, kernel, task, threads):  # type: ignore[no-untyped-def]
    """kernel(task, me) for each of so many threads; addresses of GOMP_parallel, omp_get_thread_num and the kernel."""
    run(parallel, number, kernel, task, threads)
    return 0


@intrinsic
def run(typing, parallel, number, kernel, task, threads):  # type: ignore[no-untyped-def]
    """The same, in LLVM's words: a function of C's for OpenMP to call, which calls the kernel as Numba does."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        parallel, number, kernel, task, threads = arguments
        address, void = BYTE.as_pointer(), ir.VoidType()
        told = cgutils.alloca_once(builder, ir.ArrayType(INT, 3))
        for i, value in enumerate((number, kernel, task)):
            builder.store(value, builder.gep(told, [INT(0), INT(i)]))

        part = ir.Function(builder.module, ir.FunctionType(void, [address]), f"{builder.function.name}.part")
        part.linkage = "internal"
        inside = ir.IRBuilder(part.append_basic_block("entry"))
        heard = inside.bitcast(part.args[0], INT.as_pointer())
        number, kernel, task = (inside.load(inside.gep(heard, [INT(i)])) for i in range(3))
        me = inside.call(inside.inttoptr(number, ir.FunctionType(WORD, []).as_pointer()), [])
        places = [inside.alloca(INT), inside.alloca(address)]
        kind = ir.FunctionType(WORD, [*(place.type for place in places), INT, INT])
        inside.call(inside.inttoptr(kernel, kind.as_pointer()), [*places, task, inside.sext(me, INT)])
        inside.ret_void()

        kind = ir.FunctionType(void, [part.type, address, WORD, WORD])
        target = builder.inttoptr(parallel, kind.as_pointer())
        builder.call(target, [part, builder.bitcast(told, address), builder.trunc(threads, WORD), WORD(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
