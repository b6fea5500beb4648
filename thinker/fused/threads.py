"""How a kernel is run by all of torch's threads at once: OpenMP's own call, as compiled loops of torch make it."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled.vectors import BYTE, INT, WORD, loop


def fork(parallel, number, present, kernel, task, parts):  # type: ignore[no-untyped-def]
    """kernel(task, part) for each of so many parts; addresses of GOMP_parallel, omp_get_thread_num and
    omp_get_num_threads, and of the kernel. As many threads as parts are asked for; they do all, however many come.
    """
    run(parallel, number, present, kernel, task, parts)
    return 0


@intrinsic
def run(typing, parallel, number, present, kernel, task, parts):  # type: ignore[no-untyped-def]
    """The same, in LLVM's words: a function of C's for OpenMP to call, which calls the kernel as Numba does."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        parallel, *told, parts = arguments
        address, void = BYTE.as_pointer(), ir.VoidType()
        told.append(parts)
        record = cgutils.alloca_once(builder, ir.ArrayType(INT, len(told)))
        for i, value in enumerate(told):
            builder.store(value, builder.gep(record, [INT(0), INT(i)]))

        member = ir.Function(builder.module, ir.FunctionType(void, [address]), f"{builder.function.name}.member")
        member.linkage = "internal"
        inside = ir.IRBuilder(member.append_basic_block("entry"))
        heard = inside.bitcast(member.args[0], INT.as_pointer())
        number, present, kernel, task, count = (inside.load(inside.gep(heard, [INT(i)])) for i in range(len(told)))
        ask = ir.FunctionType(WORD, []).as_pointer()
        me, threads = (inside.sext(inside.call(inside.inttoptr(call, ask), []), INT) for call in (number, present))
        places = [inside.alloca(INT), inside.alloca(address)]
        kind = ir.FunctionType(WORD, [*(place.type for place in places), INT, INT]).as_pointer()

        def one(part, _):  # type: ignore[no-untyped-def]
            inside.call(inside.inttoptr(kernel, kind), [*places, task, part])
            return []

        loop(inside, me, count, threads, [], one)
        inside.ret_void()

        kind = ir.FunctionType(void, [member.type, address, WORD, WORD]).as_pointer()
        threads = builder.trunc(parts, WORD)
        builder.call(builder.inttoptr(parallel, kind), [member, builder.bitcast(record, address), threads, WORD(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate
