"""Who does what: how work is shared out among threads."""

from __future__ import annotations

from numba import njit


@njit(error_model="numpy", inline="always")
def share(me, threads, count):  # type: ignore[no-untyped-def]
    """What falls to thread `me` of 0 to count - 1."""
    return count * me // threads, count * (me + 1) // threads
