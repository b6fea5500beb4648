"""The one compiled function that all threads of a decoder are in: how they get a job, do it, and wait for the next.

Which Python threads these are, how they begin and when they end, is `team.py`'s business.
"""

# n rows of a job, V vocab_size

from __future__ import annotations

from numba import from_dtype, njit

from ...compiled.memory import doubles, floats, integers, marks, unsigned, view_of, words
from ...sampling_kernels import draw_one
from .atomics import (
    PATIENCE,
    await_ring,
    barrier,
    enter_python,
    exchange,
    give_way,
    leave_python,
    load,
    pause,
    ring,
    store,
)
from .forward import embed, forward
from .layout import ASLEEP, BELL, BUSY, ENDED, JOB, READY, SHAPE, STATE, STRIDE
from .shares import share

LOOKS = 50_000  # how often an idle helper looks for work before it sleeps, a few milliseconds

shapes, jobs = view_of(from_dtype(SHAPE)), view_of(from_dtype(JOB))


def member(me, shape, job):  # type: ignore[no-untyped-def]
    """As thread 0: do the job with the others. As another: do its part of every job, until the team ends."""
    s, job = shapes(shape, 0, 1)[0], jobs(job, 0, 1)[0]
    if me == 0:
        slept = call_up(s, job.threads)
        state = leave_python() if slept else 0  # a helper that is only being started needs Python's lock to come here
        perform(me, s, job)
        wait_for_others(s, job.threads)
        if slept:
            enter_python(state)
    else:
        state = leave_python()
        while wait_for_work(me, s):
            perform(me, s, job)
            store(s.sync, me * STRIDE + STATE, READY)
        enter_python(state)
    return 0


@njit(error_model="numpy")
def call_up(s, threads):  # type: ignore[no-untyped-def]
    """Give every helper the job: whether one of them slept."""
    slept = False
    for other in range(1, threads):
        store(s.sync, other * STRIDE, load(s.sync, 0))  # they count meetings from here, as thread 0 does
        if not exchange(s.sync, other * STRIDE + STATE, READY, BUSY):
            store(s.sync, other * STRIDE + STATE, BUSY)
            ring(load(s.sync, other * STRIDE + BELL))
            slept = True
    return slept


@njit(error_model="numpy")
def wait_for_others(s, threads):  # type: ignore[no-untyped-def]
    """Until all have left the job, whose fields the caller is about to change."""
    for other in range(1, threads):
        looks = 0
        while load(s.sync, other * STRIDE + STATE) == BUSY:
            pause()
            looks += 1
            if looks % PATIENCE == 0:
                give_way()


@njit(error_model="numpy")
def wait_for_work(me, s):  # type: ignore[no-untyped-def]
    """Watch for a job, or sleep when there has been none for a while: whether there is one, or else the team's end."""
    looks = 0
    while True:
        state = load(s.sync, me * STRIDE + STATE)
        if state in (BUSY, ENDED):
            return state == BUSY
        looks += 1
        if state == ASLEEP or (looks >= LOOKS and exchange(s.sync, me * STRIDE + STATE, READY, ASLEEP)):
            await_ring(load(s.sync, me * STRIDE + BELL))
        pause()


@njit(error_model="numpy", inline="always")
def perform(me, s, job):  # type: ignore[no-untyped-def]
    """A thread's part of a job."""
    for turn in range(job.turns):
        if not job.embedded:
            embed(me, s, job)
            barrier(me, job.threads, s.sync)
        forward(me, s, job)
        if job.draw:
            draw(me, s, job, turn)
            barrier(me, job.threads, s.sync)
            if ended(s, job, turn):
                if me == 0:
                    job.done = turn + 1
                return


@njit(error_model="numpy")
def draw(me, s, job, turn):  # type: ignore[no-untyped-def]
    """Draw the next token of some rows and put it into the row."""
    V, own = s.vocab, s.own + me * s.step_own
    order, weights = words(own, s.at_draw, V), words(own, s.at_draw + s.vocab_width, V)
    scores = floats(own, s.at_draw + 2 * s.vocab_width, V)
    first, last = share(me, job.threads, job.rows)
    for row in range(first, last):
        slot = integers(s.slots, row, 1)[0]
        logits, seen = floats(s.logits, row * s.vocab_width, V), marks(job.seen, slot * V, V)
        settings, key = doubles(job.settings, slot * 6, 6), unsigned(job.keys, slot * 3, 3)
        token = draw_one(logits, settings, key, seen, order, weights, scores)
        integers(job.drawn, turn * job.rows + row, 1)[0] = token
        integers(s.tokens, row, 1)[0] = token
        integers(s.places, row, 1)[0] += 1


@njit(error_model="numpy")
def ended(s, job, turn):  # type: ignore[no-untyped-def]
    """Whether this was the last turn: all are done, a stop id came, or logits from which nothing could be drawn."""
    last = turn + 1 == job.turns
    drawn, stop = integers(job.drawn, turn * job.rows, job.rows), integers(job.stop, 0, job.stops)
    for row in range(job.rows):
        last = last or drawn[row] < 0
        for i in range(job.stops):
            last = last or drawn[row] == stop[i]
    return last
