"""What this machine can do at best: how fast it multiplies matrices, and how fast it reads memory.

Everything else is compared with these. The fastest of several tries counts: a limit is what is possible.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np

SIDE = 2048  # of the matrices in a product: large enough that everything but the product is negligible
PRODUCT = 2 * SIDE**3  # operations in one
BEYOND = 512 << 20  # bytes that fit into no cache
CACHE_IF_UNKNOWN = 16 << 20


def fastest(action: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many calls as `seconds` allow, of two at least, after one that doesn't count."""
    action()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def product(dtype: str) -> Callable[[], object]:
    """A large matrix product in torch, of `PRODUCT` operations, by the faster of its libraries.

    In float32 these are its usual one and oneDNN, which bfloat16 has anyway.
    """
    import torch
    import torch.nn.functional as F

    a, b = (torch.randn(SIDE, SIDE).to(getattr(torch, dtype)) for _ in range(2))
    operands = [(a, b)]
    if dtype == "float32" and torch.backends.mkldnn.is_available():
        operands.append((a.to_mkldnn(), b.to_mkldnn()))
    tries = [torch.inference_mode()(partial(F.linear, *both)) for both in operands]
    return min(tries, key=lambda one: fastest(one, 0.3)) if len(tries) > 1 else tries[0]


def product_rate(dtype: str, seconds: float = 1.0) -> float:
    """Operations per second at best."""
    return PRODUCT / fastest(product(dtype), seconds)


def reader(size: int, threads: int) -> Callable[[], object]:
    """A reading of the same `size` bytes as often as `passes(size)` says, each thread its own part of them."""
    # Written once: untouched memory is one page of zeros, which stays in the first cache.
    parts = [np.ones(max(size // 8 // threads, 1), np.int64) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(_read, parts, [passes(size)] * threads))


def passes(size: int) -> int:
    """How often a `reader` reads in one call, which shall be much longer than waking its threads."""
    return max((64 << 20) // size, 1)


@cache
def read_bandwidth(size: int, threads: int, seconds: float = 0.5) -> float:
    """Bytes per second at best in reading the same `size` bytes again and again."""
    return size * passes(size) / fastest(reader(size, threads), seconds)


def _read(words: np.ndarray, turns: int) -> None:
    """All words, as fast as memory brings them, while other threads do the same."""
    for _ in range(turns):
        words.max()


def last_level_cache() -> int:
    """Bytes of the processor's largest cache, or a guess where the system doesn't tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes, default=CACHE_IF_UNKNOWN)


def processor() -> str:
    """The processor's name, as the system has it."""
    named = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    import resource  # not there on Windows

    # What getrusage says on Linux began with the memory of the process that started this one.
    held = re.search(r"VmHWM:\s*(\d+) kB", _text("/proc/self/status"))
    if held:
        return int(held[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _text(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
