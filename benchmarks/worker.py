"""One contestant in its own process: JSON lines on stdin tell it when it is its turn, JSON lines on stdout answer.

    python -m benchmarks.worker benchmarks.contestants.ours:train '{"optimizer": "adamw"}'

First {"about": {…}} when everything is prepared; then for each {"turn": least}, which goes on until at least so many
seconds have been counted, {"seconds": …, "units": …, "cpu": …}; at the end of the input {"peak_memory": bytes}. Between
turns it waits for input and does nothing. Needs nothing but Python itself.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

UNIT = 1 if sys.platform == "darwin" else 1024  # of memory, in getrusage's answer


def main(task: str, options: dict[str, Any]) -> None:
    """Prepare the task `module:function`, then serve turns until stdin ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    module, _, function = task.partition(":")
    ready = getattr(importlib.import_module(module), function)(**options)
    answer(about=ready.about)
    for line in sys.stdin:
        least, seconds, turns, cpu = json.loads(line)["turn"], 0.0, 0, sum(os.times()[:4])
        while turns == 0 or seconds < least:
            seconds += ready.turn()
            turns += 1
        answer(seconds=seconds, units=turns * ready.units, cpu=sum(os.times()[:4]) - cpu)
    answer(peak_memory=max(peak_memory(), children_peak_memory()))


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    try:
        # What getrusage says on Linux began with the memory of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def children_peak_memory() -> int:
    """Bytes that the largest process started by this one has held; 0 without any."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * UNIT


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
