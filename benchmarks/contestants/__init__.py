"""What is compared: each file drives one program. They run in that program's environment, through `worker.py`.

A contestant is a function that prepares everything and returns `Ready`. This file needs nothing but Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ready:
    """At the start line. `turn` does the work once and returns the seconds that count, for `units` of something."""

    turn: Callable[[], float]
    units: float
    about: dict[str, Any] = field(default_factory=dict)  # versions, threads, types: what the figures depend on


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
