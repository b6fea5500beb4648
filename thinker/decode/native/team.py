"""A decoder's threads: a caller and its helpers, which do a job together in one compiled function (`member.py`).

Helpers are Python threads that live in compiled code, without Python's lock. After a job they watch for the next one,
for longer than a caller needs between two tokens; then they sleep in Python, and to wake them costs some 100
microseconds. They end with their team or with the process, and a forked child gets new ones. Numba's thread layers are
not used: their wake-ups cost as much as the work, and after a fork or on two parallel calls they can end the process.
"""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np

from .kernels import member
from .layout import STRIDE


class Team:
    """The threads of one decoder. `do` is called from one thread at a time."""

    def __init__(self, shape: np.ndarray, jobs: np.ndarray, size: int) -> None:
        self.shape, self.jobs = shape, jobs
        self.sync = np.zeros(size * STRIDE, np.int64)
        shape["sync"] = self.sync.ctypes.data
        self.addresses = shape.ctypes.data, jobs.ctypes.data
        self.wake: list[threading.Event] = []
        self.process = 0

    def do(self) -> None:
        """Do what `jobs` says, with as many threads as it says."""
        if self.process != os.getpid():
            self._gather()
        asleep = member(0, *self.addresses, False)
        if asleep:
            try:
                for me, wake in enumerate(self.wake, start=1):
                    if asleep >> me & 1:
                        wake.set()
            finally:  # helpers that have been given work wait for thread 0, even when Ctrl-C comes now
                member(0, *self.addresses, True)

    def _gather(self) -> None:
        """Start the helpers, asleep: a new team's, or those that a forked child lacks."""
        self.sync[:] = 0
        self.process = os.getpid()
        ended = threading.Event()
        self.wake = [threading.Event() for _ in range(len(self.sync) // STRIDE - 1)]
        for me, event in enumerate(self.wake, start=1):
            arguments = (me, self.shape, self.jobs, self.sync, event, ended)
            threading.Thread(target=help_out, args=arguments, name=f"thinker-native-{me}", daemon=True).start()
        weakref.finalize(self, dismiss, self.wake, ended)


def help_out(
    me: int, shape: np.ndarray, jobs: np.ndarray, sync: np.ndarray, wake: threading.Event, ended: threading.Event
) -> None:
    """A helper's life. It keeps all memory that it watches while idle, the words of `sync` too, beyond its team's."""
    while True:
        wake.wait()
        wake.clear()
        if ended.is_set():
            return
        member(me, shape.ctypes.data, jobs.ctypes.data, True)


def dismiss(wake: list[threading.Event], ended: threading.Event) -> None:
    """Let the helpers of a team end that is no longer there."""
    ended.set()
    for event in wake:
        event.set()
