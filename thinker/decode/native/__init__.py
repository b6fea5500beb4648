"""Decoding with kernels that Numba compiles for this processor: no torch, and no compiler to install.

`decoder.py` is the door; `forward.py` the network with its two halves `attention.py` and `mlp.py`; `product.py` the one
matrix product, `elementwise.py` and `rows.py` what is done to single rows; `layout.py`, `packing.py` and `model.py` the
memory, `records.py` how kernels see it, `ahead.py` what of it is fetched early; `crew.py` and `team.py` the threads,
`pace.py` how many, `member.py` what they run, `turns.py` what a job is, `shares.py` whose part is which, `meetings.py`
where they wait for each other; `drafts.py` how a text alone is written several tokens at a time, with weights from
`rounding.py`; `kernels.py` what is compiled of all that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..decoder import Weights
    from .decoder import NativeDecoder


class NativeUnavailable(RuntimeError):
    """The kernels can't be had on this machine; `TorchDecoder` does the same, slower. The message says why."""


def open_native(
    files: Weights,
    slots: int = 1,
    dtype: Literal["float32", "int8"] = "float32",
    threads: int | None = None,
    drafts: bool = True,
) -> NativeDecoder:
    """A `NativeDecoder`, or `NativeUnavailable` if Numba is missing or can't compile for this processor."""
    try:
        from ...compiled.library import compile_missing
        from .decoder import NativeDecoder
        from .kernels import ALL

        compile_missing(ALL)
        for kernel in ALL:
            kernel.prepare()
    except Exception as error:
        # Whatever goes wrong in here is Numba's or LLVM's, which raise anything: no part of the model is touched yet.
        raise NativeUnavailable(f"no native kernels on this machine: {type(error).__name__}: {error}") from error
    return NativeDecoder(files, slots, dtype, threads, drafts)
