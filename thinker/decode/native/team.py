"""A decoder's threads: a caller and its helpers, which do a job together in one compiled function (`member.py`).

Helpers are Python threads that live in compiled code, without Python's lock. After a job they watch for the next one,
for longer than a caller needs between two tokens; then they sleep until the caller, in compiled code as well, gives
them one: no signal can come in between. They end with their team or with the process, and a forked child gets new ones.
Numba's thread layers are not used: their wake-ups cost as much as the work, and after a fork or on two parallel calls
they can end the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref

import numpy as np

from .kernels import member
from .layout import BELL, ENDED, STATE, STRIDE

PYTHON = ctypes.pythonapi
PYTHON.PyThread_allocate_lock.restype = ctypes.c_void_p
PYTHON.PyThread_acquire_lock.argtypes = ctypes.c_void_p, ctypes.c_int
PYTHON.PyThread_release_lock.argtypes = PYTHON.PyThread_free_lock.argtypes = (ctypes.c_void_p,)


class Team:
    """The threads of one decoder. `do` is called from one thread at a time."""

    def __init__(self, size: int) -> None:
        self.sync = np.zeros(size * STRIDE, np.int64)
        self.address = self.sync.ctypes.data
        self.process = 0
        self._gathering = threading.Lock()

    def do(self, task: int) -> None:
        """Do what the job at the address `task` says, with as many threads as it says."""
        if self.process != os.getpid():
            # Not in this thread, where Ctrl-C could leave helpers that the next ones share their words with.
            gathering = threading.Thread(target=self._gather)
            gathering.start()
            gathering.join()
            if self.process != os.getpid():
                raise RuntimeError(f"{len(self.sync) // STRIDE - 1} threads can't be started: choose fewer")
        member(0, self.address, task)

    def _gather(self) -> None:
        """Start the helpers, asleep: a new team's, or those that a forked child lacks."""
        with self._gathering:
            if self.process == os.getpid():  # by one before, which nobody waited for till its end
                return
            self.sync[:] = 0
            bells = [Bell() for _ in range(len(self.sync) // STRIDE - 1)]
            weakref.finalize(self, dismiss, self.sync, bells)
            for me, bell in enumerate(bells, start=1):
                self.sync[me * STRIDE + BELL] = bell.address
                thread = threading.Thread(target=help_out, args=(me, self.sync, bell), name=f"thinker-native-{me}")
                thread.daemon = True
                thread.start()
            self.process = os.getpid()


class Bell:
    """What a helper sleeps on: a lock of Python's own, which compiled code takes and gives without Python's big one."""

    def __init__(self) -> None:
        self.address = PYTHON.PyThread_allocate_lock()
        PYTHON.PyThread_acquire_lock(self.address, 1)
        # Not at the end of the process, when a helper may be waiting for it.
        weakref.finalize(self, PYTHON.PyThread_free_lock, self.address).atexit = False

    def ring(self) -> None:
        """Wake who sleeps on it, or have the next who would not."""
        PYTHON.PyThread_release_lock(self.address)


def help_out(me: int, sync: np.ndarray, bell: Bell) -> None:
    """A helper's life. It keeps all memory that it watches while idle: its bell and the words of `sync`."""
    member(me, sync.ctypes.data, 0)


def dismiss(sync: np.ndarray, bells: list[Bell]) -> None:
    """Let the helpers of a team end that is no longer there."""
    for me, bell in enumerate(bells, start=1):
        sync[me * STRIDE + STATE] = ENDED
        bell.ring()
