"""A whole process, from the command to the first byte that it writes."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from . import Ready


def command(arguments: list[str], about: dict[str, Any]) -> Ready:
    """Starts of a program that writes a text to stdout; how long it goes on after the first byte doesn't count."""
    # Python keeps what it has compiled, as where a person works, whatever was said here.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def turn() -> float:
        start = time.perf_counter()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with subprocess.Popen(arguments, **pipes, env=environment) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            raise ChildProcessError(f"{arguments[0]} ended with status {process.returncode}")
        return seconds

    return Ready(turn, 1, about)
