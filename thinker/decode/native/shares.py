"""Who does what in attention: how its heads are shared out among threads."""

from __future__ import annotations

from numba import njit

from ...compiled.shares import share


@njit(error_model="numpy", inline="always")
def by_whole_groups(s, job):  # type: ignore[no-untyped-def]
    """Whether each thread attends by all heads of some groups, so that it may make their q, k and v for itself."""
    return s.groups % job.threads == 0


@njit(error_model="numpy", inline="always")
def share_of_heads(me, s, job, part):  # type: ignore[no-untyped-def]
    """Which heads thread `me` makes, of those of queries (part 0), of keys (1) and of values (2), numbered through."""
    H, G = s.heads, s.groups
    if not by_whole_groups(s, job):  # as evenly as can be
        return share(me, job.threads, H + 2 * G) if part == 0 else (0, 0)
    start, count = (0, H) if part == 0 else (H + (part - 1) * G, G)
    first, last = share(me, job.threads, count)
    return start + first, start + last


@njit(error_model="numpy", inline="always")
def share_of_attention(me, s, job):  # type: ignore[no-untyped-def]
    """How many heads attend together, and which items, a block of rows by so many heads each, fall to thread `me`."""
    H, G = s.heads, s.groups
    by_group = job.together == 1 and (job.rows * G % job.threads == 0 or job.rows * G >= 4 * job.threads)
    heads = H // G if by_group else 1
    blocks = (job.rows + job.together - 1) // job.together
    first, last = share(me, job.threads, H // heads * blocks)
    return heads, first, last
