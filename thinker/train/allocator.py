"""The memory of this process and of this machine, as the system counts it, the C library's heap, and running out.

What a training run needs of them is worked out in `rehearsal.py` and `estimate.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ALIGNMENT = 64  # of torch's tensors on a processor
PAGE, HUGE_PAGE = 1 << 15, 1 << 21  # bytes that are taken to be written together, and that a huge page has
REACH = 1 << 37  # bytes of the heap whose addresses are told apart
PR_SET_THP_DISABLE = 41  # of linux/prctl.h
MADV_HUGEPAGE = 14  # of linux/mman.h
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 1, -1, -3  # of glibc's malloc.h
NEVER = -1  # as the last two take it
# torch's own allocators, oneDNN's, and C++'s have no exception of their own that is known without torch.
ALLOCATORS_COMPLAIN = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")


class Heap:
    """What the heap would hold of the system if every piece taken from it were written to; nobody must write to any.

    What is given back stays a hole, unless it is large enough to lie outside the heap, or the heap's end comes down
    to it. With another C library than glibc, and on request, nothing is taken, and nothing held.
    """

    def __init__(self, known: bool = True) -> None:
        self.apart = 0  # bytes of the pieces outside the heap
        self.pages = 0  # of the heap that were written to
        self.most = 0  # bytes held, at most
        self.page = HUGE_PAGE if huge_pages() else PAGE
        heap = re.search(r"^(\w+)-\w+ .*\[heap\]$", _text("/proc/self/maps"), re.MULTILINE)
        self.known = known and heap is not None and platform.libc_ver()[0] == "glibc"
        if heap is None or not self.known:
            return
        self.begin = int(heap[1], 16)
        self.written = np.zeros(REACH // self.page, bool)
        self.c = ctypes.CDLL(None)
        self.c.memalign.restype = self.c.sbrk.restype = ctypes.c_void_p
        self.c.memalign.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.c.sbrk.argtypes = [ctypes.c_ssize_t]
        self.c.free.argtypes = [ctypes.c_void_p]
        self.end = self.c.sbrk(0)

    def take(self, size: int) -> int | None:
        """The address of a new piece; None where there is none to have."""
        address: int | None = self.c.memalign(ALIGNMENT, size) if self.known else None
        if address is None:
            return None
        if self._inside(address):
            self.end = self.c.sbrk(0)
            first = (address - self.begin) // self.page
            part = self.written[first : (address + size - 1 - self.begin) // self.page + 1]
            self.pages += part.size - int(np.count_nonzero(part))
            part[:] = True
        else:
            self.apart += size
        self.most = max(self.most, self.held)
        return address

    def give_back(self, address: int | None, size: int) -> None:
        """Return a piece that `take` gave."""
        if address is None:
            return
        self.c.free(address)
        if not self._inside(address):
            self.apart -= size
        elif (end := self.c.sbrk(0)) < self.end:
            gone = self.written[(end - self.begin) // self.page + 1 : (self.end - self.begin) // self.page + 1]
            self.pages -= int(np.count_nonzero(gone))
            gone[:] = False
            self.end = end

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self.pages * self.page + self.apart

    def _inside(self, address: int) -> bool:
        return 0 <= address - self.begin < REACH

    @contextmanager
    def in_small_pages(self) -> Iterator[None]:
        """Inside the block the few bytes that the heap itself writes beside a piece never take a huge page."""
        if self.known:
            self.c.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        try:
            yield
        finally:
            if self.known:
                self.c.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def keep_freed_memory() -> None:
    """Let the heap keep what is freed, whatever its size, and lie in huge pages, where the C library is glibc.

    A step takes what the last had. Without that the large tensors of every step go back to the system and come again
    page by page, filled with zeros: 48,000 pages a step of the tiny model, 9 % of its time. Another 6 % is what the
    processor takes to find small pages. The system gives large ones only where they are asked for beforehand: addresses
    for half of what is free are taken and given back. They cost nothing until they are used. Scraps are joined to their
    neighbours at once: else every large piece has all of them looked through, 1 % of a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    c = ctypes.CDLL(None)
    for parameter, value in ((M_TRIM_THRESHOLD, NEVER), (M_MMAP_THRESHOLD, NEVER), (M_MXFAST, 0)):
        c.mallopt(parameter, value)
    c.memalign.restype = ctypes.c_void_p
    size = ctypes.c_size_t((free_memory() or 0) // 2)
    if huge_pages() and (address := c.memalign(ctypes.c_size_t(HUGE_PAGE), size)):
        c.madvise(ctypes.c_void_p(address), size, MADV_HUGEPAGE)
        c.free(ctypes.c_void_p(address))


def huge_pages() -> bool:
    """Whether this system gives huge pages to those who ask."""
    return re.search(r"\[(always|madvise)\]", _text("/sys/kernel/mm/transparent_hugepage/enabled")) is not None


def trim() -> None:
    """Give the system back what the heap does not use, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of memory that this process holds now; what it held at most where the system doesn't tell."""
    return _status("VmRSS") or _most_by_getrusage()


def peak() -> int:
    """Bytes that this process has held at most, since `forget_peak` where the system can do that."""
    return _status("VmHWM") or _most_by_getrusage()


def forget_peak() -> bool:
    """Let the system count the peak of this process from now on; False where it can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def free_memory() -> int | None:
    """Bytes that this process could hold without swapping, what it holds already included; None where nobody tells."""
    limits = []
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE):
        limits.append(int(found[1]) * 1024 + resident())
    elif sys.platform == "darwin":
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")  # what a container may have; of what it has, cached files can go
    most, now = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if most.isdigit() and now.isdigit():
        cached = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        limits.append(int(most) - int(now) + (int(cached[1]) if cached else 0) + resident())
    return min(limits, default=None)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's, so that less of everything may succeed."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ALLOCATORS_COMPLAIN)
    return isinstance(error, MemoryError)


def _status(field: str) -> int | None:
    found = re.search(rf"^{field}:\s*(\d+) kB", _text("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _most_by_getrusage() -> int:
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _text(path: str | Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
