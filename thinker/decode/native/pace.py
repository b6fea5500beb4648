"""How many threads make tokens fastest on this machine, and now: a choice that never changes a bit of the result.

Threads that meet twenty times a token wait long when one of them is not running because another program is. Then one
thread alone is the faster team, for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Choice = TypeVar("Choice")

STALLED = 3.0  # so many times its usual time takes a turn that waited for a thread
LEAST, MOST = 0.01, 0.5  # seconds alone after a stall; twice as many after each that follows


class Pace:
    """The number of threads for each job: as many as are fastest for it, or 1 for some time after they have stalled."""

    def __init__(self) -> None:
        self.alone_until, self.penalty = 0.0, LEAST
        self.usual: dict[Hashable, float] = {}

    def begin(self, threads: int) -> int:
        """The number of threads for the next job, which is fastest with `threads`."""
        return threads if time.perf_counter() >= self.alone_until else 1

    def end(self, threads: int, kind: Hashable, seconds: float) -> None:
        """Learn how long a turn of this kind took with so many threads."""
        if threads == 1:
            return
        usual = self.usual.get(kind, seconds)
        if seconds > STALLED * usual:
            self.alone_until = time.perf_counter() + self.penalty
            self.penalty = min(2 * self.penalty, MOST)
        else:
            self.penalty = max(self.penalty / 2, LEAST)
        # Attention grows with the text: what is usual may rise, slowly.
        self.usual[kind] = min(seconds, 1.05 * usual)


def fastest(choices: Iterable[Choice], do: Callable[[Choice], None], seconds: float = 0.02) -> Choice:
    """The choice that `do` is done with fastest, found in about so long. A later one must be 5 % better."""
    taken = seconds_of(choices, do, seconds)
    best = next(iter(taken))
    for choice, time_taken in taken.items():
        if time_taken < 0.95 * taken[best]:
            best = choice
    return best


def seconds_of(choices: Iterable[Choice], do: Callable[[Choice], None], seconds: float) -> dict[Choice, float]:
    """The shortest time that `do` took with each choice; all in turns, for about so long, each at least twice."""
    taken = dict.fromkeys(choices, float("inf"))
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < seconds:
        rounds += 1
        for choice in taken:
            start = time.perf_counter()
            do(choice)
            taken[choice] = min(taken[choice], time.perf_counter() - start)
    return taken
