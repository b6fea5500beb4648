"""The one compiled function that all threads of a decoder are in: how they get a job, do it, and wait for the next.

Which Python threads these are, how they begin and when they end, is `team.py`'s business, a job `turns.py`'s.
"""

from __future__ import annotations

from numba import njit

from ...compiled.atomics import PATIENCE, exchange, give_way, load, pause, store
from .layout import ASLEEP, BELL, BUSY, ENDED, READY, STATE, STRIDE, TASK
from .meetings import await_ring, enter_python, leave_python, ring
from .records import jobs
from .turns import perform

LOOKS = 50_000  # how often an idle helper looks for work before it sleeps, a few milliseconds


def member(me, sync, task):  # type: ignore[no-untyped-def]
    """As thread 0: do the job at the address `task` with the others. As another: its part of all, until the end."""
    if me == 0:
        threads = jobs(task, 0, 1)[0].threads
        slept = call_up(sync, threads, task)
        state = leave_python() if slept else 0  # a helper that is only being started needs Python's lock to come here
        perform(me, task)
        wait_for_others(sync, threads)
        if slept:
            enter_python(state)
    else:
        state = leave_python()
        while wait_for_work(me, sync):
            perform(me, load(sync, me * STRIDE + TASK))
            store(sync, me * STRIDE + STATE, READY)
        enter_python(state)
    return 0


@njit(error_model="numpy")
def call_up(sync, threads, task):  # type: ignore[no-untyped-def]
    """Give every helper the job: whether one of them slept."""
    slept = False
    for other in range(1, threads):
        store(sync, other * STRIDE, load(sync, 0))  # they count meetings from here, as thread 0 does
        store(sync, other * STRIDE + TASK, task)
        if not exchange(sync, other * STRIDE + STATE, READY, BUSY):
            store(sync, other * STRIDE + STATE, BUSY)
            ring(load(sync, other * STRIDE + BELL))
            slept = True
    return slept


@njit(error_model="numpy")
def wait_for_others(sync, threads):  # type: ignore[no-untyped-def]
    """Until all have left the job, whose fields the caller is about to change."""
    for other in range(1, threads):
        looks = 0
        while load(sync, other * STRIDE + STATE) == BUSY:
            pause()
            looks += 1
            if looks % PATIENCE == 0:
                give_way()


@njit(error_model="numpy")
def wait_for_work(me, sync):  # type: ignore[no-untyped-def]
    """Watch for a job, or sleep when there has been none for a while: whether there is one, or else the team's end."""
    looks = 0
    while True:
        state = load(sync, me * STRIDE + STATE)
        if state in (BUSY, ENDED):
            return state == BUSY
        looks += 1
        if state == ASLEEP or (looks >= LOOKS and exchange(sync, me * STRIDE + STATE, READY, ASLEEP)):
            await_ring(load(sync, me * STRIDE + BELL))
        pause()
