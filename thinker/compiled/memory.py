"""Looking at memory from compiled code: parts of flat arrays, and records, by address.

Kernels are given addresses, since every array that is passed on its own costs a call time and the compiler work.
Whoever gives them keeps the arrays alive and as large as they need to be.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


def view_of(dtype: Any) -> Any:
    """view(address, at, count) of elements of this Numba type: a one-dimensional array."""

    @intrinsic
    def view(typing: Any, address: Any, at: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, at, count = arguments
            size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(dtype)))
            array = context.make_array(signature.return_type)(context, builder)
            base = builder.inttoptr(address, context.get_data_type(dtype).as_pointer())
            shape, strides = cgutils.pack_array(builder, [count]), cgutils.pack_array(builder, [size])
            populate_array(array, builder.gep(base, [at]), shape, strides, size, None)
            return array._getvalue()

        return types.Array(dtype, 1, "C")(types.int64, types.int64, types.int64), generate

    return view


# floats(address, at, count): a view of elements at to at + count - 1 of the array that begins at the address. Unlike
# a slice it counts no references, over which threads would fight; its indices are never negative, which allows vectors.
floats, doubles = view_of(types.float32), view_of(types.float64)
integers, unsigned, shorts = view_of(types.int64), view_of(types.uint64), view_of(types.int16)
bytes_, marks, words = view_of(types.int8), view_of(types.uint8), view_of(types.int32)


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, *indices: ir.Value) -> ir.Value:
    """Where the element with the sum of the indices lies, for other intrinsics."""
    place = builder.inttoptr(address, kind.as_pointer())
    for index in indices:
        place = builder.gep(place, [index])
    return place
