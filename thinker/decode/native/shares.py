"""Who does what: how the work of a phase is shared out among threads."""

from __future__ import annotations

from numba import njit


@njit(error_model="numpy", inline="always")
def share(me, threads, count):  # type: ignore[no-untyped-def]
    """What falls to thread `me` of 0 to count - 1."""
    return count * me // threads, count * (me + 1) // threads


@njit(error_model="numpy", inline="always")
def share_of_attention(me, s, job):  # type: ignore[no-untyped-def]
    """How many heads attend together, and which items, a block of rows by so many heads each, fall to thread `me`."""
    H, G = s.heads, s.groups
    by_group = job.together == 1 and (job.rows * G % job.threads == 0 or job.rows * G >= 4 * job.threads)
    heads = H // G if by_group else 1
    blocks = (job.rows + job.together - 1) // job.together
    first, last = share(me, job.threads, H // heads * blocks)
    return heads, first, last
