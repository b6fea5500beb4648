"""The compiled functions of this room, and whether they can be had. To import this compiles nothing."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..compiled.library import Kernel
from ..compiled.processor import JOINS_PRODUCTS, NEGLECTED, PAIRS_OF_BFLOAT16, SLOW_PAIRS, TILES

SHARED = "parts", "scratch", "step_scratch"  # how a task is cut, the first part's own memory, bytes to the next one's
SOURCES = list(Path(__file__).parent.glob("*.py"))


def _kernel(module: str, name: str, arguments: int = 2) -> Kernel:
    return Kernel(f"thinker.fused.{module}", name, arguments, SOURCES)


def _both(module: str, name: str) -> dict[torch.dtype, Kernel]:
    """By the type of its numbers."""
    return {torch.bfloat16: _kernel(module, f"{name}_narrow"), torch.float32: _kernel(module, f"{name}_wide")}


attend_forward, attend_backward = (_both("attention_kernels", name) for name in ("forward", "backward"))
gate_forward, gate_backward = (_both("gating_kernels", name) for name in ("forward", "backward"))
norm_forward, norm_backward = (_both("norm_kernels", name) for name in ("forward", "backward"))
take_softmax = _both("cross_entropy_kernels", "take_softmax")
add_products = _kernel("weights_kernels", "add_products")
multiply = _kernel("products_kernels", "multiply")
fork = _kernel("threads", "fork", 6)
EITHER = attend_forward, attend_backward, gate_forward, gate_backward, norm_forward, norm_backward, take_softmax
# What a training wants whose products are of such numbers. Norms are of float32 in the other one too.
KERNELS = {
    torch.bfloat16: (
        *(kernel[torch.bfloat16] for kernel in EITHER),
        *(kernel[torch.float32] for kernel in (norm_forward, norm_backward)),
        *((add_products,) if TILES else ()),
        fork,
    ),
    torch.float32: (*(kernel[torch.float32] for kernel in EITHER), *((multiply,) if NEGLECTED else ()), fork),
}

LINE = 64  # bytes
STEP = 32  # rows, columns and inputs of products are multiples of it

ARCH_PRCTL, ASK_FOR_STATE, TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


def form() -> Literal["tiles", "pairs", "none"]:
    """What this process multiplies bfloat16 with, if it trains in that."""
    if numbers() != torch.bfloat16 or hindrance(torch.bfloat16) is not None:
        return "none"
    return "tiles" if TILES else "pairs"


@torch.compiler.assume_constant_result
def numbers() -> torch.dtype:
    """What is fastest in training on this processor, and has kernels: bfloat16 if it is quick in that, else float32."""
    return torch.bfloat16 if multiplies(torch.bfloat16) and not SLOW_PAIRS else torch.float32


@cache
def hindrance(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for such numbers, or none if there are. The first time they are compiled."""
    if not multiplies(dtype):
        return "they are for x86-64 processors under Linux that have AVX2 and FMA, or AVX512's products of bfloat16"
    # The system keeps a thread's tiles only for processes that have asked.
    if dtype == torch.bfloat16 and TILES and ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR_STATE, TILE_DATA) != 0:
        return "the system keeps no tiles for this process"
    try:
        threads()
        for kernel in KERNELS[dtype]:
            kernel.prepare()
    except Exception as error:
        # Whatever goes wrong in here is Numba's, LLVM's, or a missing name's: the plain forms do the same, slower.
        return f"{type(error).__name__}: {error}"
    return None


@torch.compiler.assume_constant_result
def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for such numbers here; the first time they are compiled, in some seconds."""
    return hindrance(dtype) is None


def serve(x: Tensor, wide: bool = False) -> bool:
    """Whether kernels are for these numbers: on a processor, those it trains in, or if `wide`, float32 beside them."""
    if x.device.type != "cpu":
        return False
    dtype = torch.get_autocast_dtype("cpu") if wide and torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == numbers() and x.dtype in (dtype, torch.float32) and is_available(dtype)


def along(x: Tensor) -> Tensor:
    """x, or a copy, so that its rows lie along the memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def perform(
    kernel: Kernel, kind: np.dtype, fields: Mapping[str, Any], scratch: int = 0, most: int | None = None
) -> None:
    """Have all of torch's threads, at most so many, do a task: a record of that kind, which begins with `SHARED`.

    Each has so many bytes of scratch memory.
    """
    # What this processor trains in comes first, so that nothing is compiled for the sake of the question.
    assert not (wanting := [dtype for dtype in (numbers(), *KERNELS) if kernel in KERNELS[dtype]]) or any(
        map(is_available, wanting)
    ), "the system must have been asked for tiles"
    parts, step = shares(scratch, most)
    memory = torch.empty(parts * step + LINE, dtype=torch.uint8)
    shared = zip(SHARED, (parts, -(-memory.data_ptr() // LINE) * LINE, step), strict=True)
    values = {**dict(zip(kind.names or (), np.zeros((), kind).tolist(), strict=True)), **dict(shared), **fields}
    task = np.array([tuple(values.values())], kind)
    fork(*threads(), kernel.prepare(), task.ctypes.data, parts)


def shares(scratch: int, most: int | None = None) -> tuple[int, int]:
    """How many threads, at most so many, do a task, and the bytes of whole lines that each has of scratch memory."""
    return min(torch.get_num_threads(), most or sys.maxsize), -(-scratch // LINE) * LINE


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for such numbers' products, on a system whose threads are known here."""
    able = {torch.bfloat16: PAIRS_OF_BFLOAT16, torch.float32: JOINS_PRODUCTS}.get(dtype, False)
    return sys.platform == "linux" and platform.machine() == "x86_64" and able


def must_compile(dtype: torch.dtype) -> bool:
    """Whether kernels for such numbers can be had here, but not at once."""
    try:
        return multiplies(dtype) and not all(kernel.is_kept for kernel in KERNELS[dtype])
    except ImportError:
        return False


@cache
def threads() -> tuple[int, ...]:
    """The addresses of three functions of torch's OpenMP: to have threads work, which one is asking, and of how many.

    Raises `AttributeError` where torch has another library, or has not been imported.
    """
    library = ctypes.CDLL(None)
    calls = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    return tuple(ctypes.cast(call, ctypes.c_void_p).value or 0 for call in calls)
