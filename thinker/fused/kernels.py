"""The compiled functions of this room, and whether they can be had. To import this compiles nothing."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Literal

from ..compiled.library import Kernel
from ..compiled.processor import PAIRS_OF_BFLOAT16, TILES

SOURCES = list(Path(__file__).parent.glob("*.py"))
attend_forward = Kernel("thinker.fused.attention_kernels", "forward", 2, SOURCES)
attend_backward = Kernel("thinker.fused.attention_kernels", "backward", 2, SOURCES)
fork = Kernel("thinker.fused.threads", "fork", 6, SOURCES)
KERNELS = attend_forward, attend_backward, fork

ARCH_PRCTL, ASK_FOR_STATE, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


def form() -> Literal["tiles", "pairs", "none"]:
    """What this process multiplies bfloat16 with."""
    if hindrance() is not None:
        return "none"
    return "tiles" if TILES else "pairs"


@cache
def hindrance() -> str | None:
    """Why there are no kernels here, or none if there are. The first time on a machine they are compiled."""
    if not multiplies():
        return "this processor has no products of bfloat16, or its system isn't Linux"
    # The system keeps a thread's tiles only for processes that have asked.
    if TILES and ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR_STATE, TILE_DATA) != 0:
        return "the system keeps no tiles for this process"
    try:
        threads()
        for kernel in KERNELS:
            kernel.prepare()
    except Exception as error:
        # Whatever goes wrong in here is Numba's, LLVM's, or a missing name's: the plain forms do the same, slower.
        return f"{type(error).__name__}: {error}"
    return None


def multiplies() -> bool:
    """Whether this processor has instructions for products of bfloat16, on a system whose threads are known here."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and PAIRS_OF_BFLOAT16


def are_kept() -> bool:
    """Whether all have been compiled before."""
    return all(kernel.is_kept for kernel in KERNELS)


@cache
def threads() -> tuple[int, ...]:
    """The addresses of three functions of torch's OpenMP: to have threads work, which one is asking, and of how many.

    Raises `AttributeError` where torch has another library, or has not been imported.
    """
    library = ctypes.CDLL(None)
    calls = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    return tuple(ctypes.cast(call, ctypes.c_void_p).value or 0 for call in calls)
