"""A whole process, from the command to the first byte that it writes."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from . import Ready


def command(arguments: list[str], about: dict[str, Any]) -> Ready:
    """Starts of a program that writes a text to stdout; how long it goes on after the first byte doesn't count."""

    def turn() -> float:
        start = time.perf_counter()
        with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            raise ChildProcessError(f"{arguments[0]} ended with status {process.returncode}")
        return seconds

    return Ready(turn, 1, about)
