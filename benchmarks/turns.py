"""Contestants take turns on one machine: each in a process of its own, one at work while all others wait.

Absolute figures drift with whatever else the machine does, by tens of per cent; what is measured in the same minute
drifts together. So nothing is compared that was not measured in turns, in one run. What the contestants do is in
`contestants/`; what their results mean, in `results.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST = 0.3  # seconds that count in one turn: short work is repeated
PAUSE = 0.05  # seconds between turns, until the last one's threads have gone from spinning to sleep
PATIENCE = 900.0  # seconds for one answer, compiling included
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """A name, what does the work (`module:function` with options), and the interpreter that has what it needs."""

    name: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    environment: dict[str, str] | None = None


@dataclass(frozen=True)
class Result:
    """Units per second in each round, the peak memory in bytes, and what the contestant said about itself."""

    rates: tuple[float, ...]
    peak_memory: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Meeting:
    """What came of one meeting: results by name, who was left out and why, and how busy others kept the machine."""

    results: dict[str, Result]
    left_out: dict[str, str]
    other_work: float | None  # the share of all cores during the rounds, median; None where the system doesn't tell


class Died(Exception):
    """A contestant's process ended, or said nothing for too long; the message is one line."""


class Worker:
    """A contestant's process, until `close`."""

    def __init__(self, contestant: Contestant) -> None:
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [contestant.python, "-m", "benchmarks.worker", contestant.task, json.dumps(contestant.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                text=True,
                cwd=ROOT,
                env=contestant.environment,
            )
        except OSError as error:
            self._complaints.close()
            raise Died(f"{contestant.python} can't be started: {error.strerror} (make -C benchmarks env)") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout

    def ready(self) -> dict[str, Any]:
        """Wait until it is prepared: what it says about itself."""
        about: dict[str, Any] = self._answer()["about"]
        return about

    def turn(self, least: float = LEAST) -> Turn:
        """Let it work for `least` seconds or longer."""
        before = busy_seconds()
        try:
            self._asks.write(json.dumps({"turn": least}) + "\n")
            self._asks.flush()
        except BrokenPipeError:
            raise Died(self._last_words()) from None
        start = time.perf_counter()
        answer = self._answer()
        wall, after = time.perf_counter() - start, busy_seconds()
        others = None
        if before is not None and after is not None:
            others = max(after - before - answer["cpu"], 0) / (wall * (os.cpu_count() or 1))
        return Turn(answer["units"] / answer["seconds"], others)

    def end(self) -> int:
        """Let the process end by itself; its peak memory in bytes."""
        self._asks.close()
        return int(self._answer()["peak_memory"])

    def close(self) -> None:
        """Whatever it does, it is over."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._asks, self._answers, self._complaints):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        try:
            line = self._answers.readline()
            in_time = watchdog.is_alive()
        finally:
            watchdog.cancel()  # after Ctrl-C, too: the program doesn't end before it
        if not line:
            raise Died(self._last_words() if in_time else f"said nothing for {PATIENCE:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._complaints.seek(0)
        lines = [line.strip() for line in self._complaints if line.strip()]
        return f"ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")


@dataclass(frozen=True)
class Turn:
    """Units per second, and the share of the machine that others used meanwhile."""

    rate: float
    others: float | None


def take_turns(
    contestants: Sequence[Contestant],
    rounds: int,
    warm_ups: int,
    say: Say,
    start: Callable[[Contestant], Worker] = Worker,
) -> Meeting:
    """Let all contestants meet. Who dies is told to `say` in one line and left out; the others go on.

    Each one prepares and warms up alone. Then come the rounds, every other one in the opposite order.
    """
    turns: dict[str, list[Turn]] = {}
    about: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}

    @contextlib.contextmanager
    def leaving_out(name: str) -> Iterator[None]:
        try:
            yield
        except Died as error:
            left_out[name] = str(error)
            say(f"left out: {name} {error}")
            if name in workers:
                workers.pop(name).close()

    try:
        for contestant in contestants:
            say(f"preparing: {contestant.name}")
            name = contestant.name
            with leaving_out(name):
                workers[name] = start(contestant)
                about[name], turns[name] = workers[name].ready(), []
                for _ in range(warm_ups):
                    workers[name].turn()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in list(workers)[:: -1 if number % 2 else 1]:
                time.sleep(PAUSE)
                with leaving_out(name):
                    turns[name].append(workers[name].turn())
        for name in list(workers):
            with leaving_out(name):
                peaks[name] = workers[name].end()
    finally:
        for worker in workers.values():
            worker.close()
    results = {name: Result(tuple(turn.rate for turn in turns[name]), peaks[name], about[name]) for name in peaks}
    others = [turn.others for name in results for turn in turns[name] if turn.others is not None]
    return Meeting(results, left_out, statistics.median(others) if others else None)


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine started; None where the system doesn't tell."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, first.split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
