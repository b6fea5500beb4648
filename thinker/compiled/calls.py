"""A kernel called from another one by its address: what calls it need not be compiled with all that it is made of."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import BYTE, INT, WORD


@intrinsic
def call(typing: Any, address: Any, *arguments: Any) -> Any:
    """Call the kernel at an address, as Numba does: with places for its result and for an error, which has none."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        address, arguments = given
        values = cgutils.unpack_tuple(builder, arguments)
        places = [cgutils.alloca_once(builder, INT), cgutils.alloca_once(builder, BYTE.as_pointer())]
        function = ir.FunctionType(WORD, [value.type for value in (*places, *values)])
        builder.call(builder.inttoptr(address, function.as_pointer()), [*places, *values])
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple.from_types((types.int64,) * len(arguments))), generate
