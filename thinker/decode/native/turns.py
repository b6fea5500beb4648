"""A thread's part of a job: turns of the network, and in between the draws of what comes next.

A text that advances alone may be drafted: then each turn of one model is a check of what another has written ahead.
`drafts.py` says what for.
"""

# V vocab_size, n rows of a check: the last token, and what was drafted after it

from __future__ import annotations

from numba import njit

from ...compiled.calls import call
from ...compiled.memory import doubles, integers, marks, unsigned
from ...compiled.shares import share
from .ahead import ask_for_vector
from .attention import narrow
from .meetings import barrier
from .records import jobs, shapes


@njit(error_model="numpy")
def perform(me, task):  # type: ignore[no-untyped-def]
    """Do one's part of the job at an address."""
    if jobs(task, 0, 1)[0].draft:
        write_ahead(me, task)
    else:
        take_turns(me, task)


@njit(error_model="numpy")
def take_turns(me, task):  # type: ignore[no-untyped-def]
    """The network, and if so wanted a draw for each row and the network again, until one row ends."""
    job = jobs(task, 0, 1)[0]
    s = shapes(job.shape, 0, 1)[0]
    for turn in range(job.turns):
        call(s.network, me, task)
        if job.draw:
            first, last = share(me, job.threads, job.rows)
            for row in range(first, last):
                to = job.drawn + 8 * (turn * job.rows + row)
                draw(me, s, job, row, to)
                token = integers(to, 0, 1)[0]
                integers(s.tokens, row, 1)[0] = token
                integers(s.places, row, 1)[0] += 1
                ask_for_vector(s, max(token, 0))
            barrier(me, job.threads, s.sync)
            over = turn + 1 == job.turns
            for row in range(job.rows):
                over |= ends(job, integers(job.drawn, turn * job.rows + row, 1)[0])
            if over:
                if me == 0:
                    job.done = turn + 1
                return


@njit(error_model="numpy")
def write_ahead(me, task):  # type: ignore[no-untyped-def]
    """Write up to `turns` tokens of the first row's slot, in up to `checks` drafts and checks."""
    job = jobs(task, 0, 1)[0]
    draft, s = jobs(job.draft, 0, 1)[0], shapes(job.shape, 0, 1)[0]
    slot, held, token = integers(s.slots, 0, 1)[0], integers(s.places, 0, 1)[0], integers(s.tokens, 0, 1)[0]
    written, checks = 0, 0
    drafted, drawn = integers(draft.drawn, 0, job.length), integers(job.drawn, 0, job.turns)
    drafting = shapes(draft.shape, 0, 1)[0]
    narrow(me, job.threads, s, drafting, slot, job.narrowed, held)
    while written < job.turns and checks < job.checks and not (checks and ends(job, token)):
        length = min(job.length, job.turns - written - 1)
        if me == 0:
            put(s, 0, slot, held, token)
            draw_alike(s, job, draft, slot)
            draft.threads, draft.turns, draft.done = job.threads, length, 0
        barrier(me, job.threads, s.sync)
        if length:
            take_turns(me, job.draft)
            barrier(me, job.threads, s.sync)
        n = 1
        while n <= draft.done and not ends(job, drafted[n - 1]):  # nothing is drawn behind a text's end
            n += 1
        if me == 0:
            put(s, 0, slot, held, token)  # again, since the draft has moved on with the row
            for row in range(1, n):
                put(s, row, slot, held + row, drafted[row - 1])
            job.rows = n
        barrier(me, job.threads, s.sync)
        call(s.network, me, task)
        if me == 0:
            job.done = 0
            while job.done < n and (job.done == 0 or drawn[written + job.done - 1] == drafted[job.done - 1]):
                draw(me, s, job, job.done, job.drawn + 8 * (written + job.done))
                job.done += 1
            right = job.done - 1
            if right < draft.done:
                job.tried += 1
                right += drawn[written + right] == drafted[right]
            job.tried, job.right = job.tried + job.done - 1, job.right + right
        barrier(me, job.threads, s.sync)
        narrow(me, job.threads, s, drafting, slot, held, held + job.done)
        written, held, checks = written + job.done, held + job.done, checks + 1
        token = drawn[written - 1]
    barrier(me, job.threads, s.sync)  # all have read what the last check has written
    if me == 0:
        job.done, job.checked = written, checks


@njit(error_model="numpy")
def put(s, row, slot, place, token):  # type: ignore[no-untyped-def]
    """Put a token into a row."""
    integers(s.slots, row, 1)[0] = slot
    integers(s.places, row, 1)[0] = place
    integers(s.tokens, row, 1)[0] = token


@njit(error_model="numpy")
def draw(me, s, job, row, to):  # type: ignore[no-untyped-def]
    """Draw the next token of a row, into the number at address `to`."""
    slots, logits = s.slots + 8 * row, s.logits + 4 * row * s.vocab_width
    scratch = s.own + me * s.step_own + 4 * s.at_draw
    call(s.sampler, slots, 1, logits, s.vocab, job.settings, job.keys, job.seen, scratch, to)


@njit(error_model="numpy")
def draw_alike(s, job, draft, slot):  # type: ignore[no-untyped-def]
    """Have the draft drawn as the text will be: with its settings, its next random numbers and what it has seen."""
    V = s.vocab
    settings, like_settings = doubles(draft.settings, slot * 6, 6), doubles(job.settings, slot * 6, 6)
    keys, like_keys = unsigned(draft.keys, slot * 3, 3), unsigned(job.keys, slot * 3, 3)
    seen, like_seen = marks(draft.seen, slot * V, V), marks(job.seen, slot * V, V)
    for i in range(6):
        settings[i] = like_settings[i]
    for i in range(3):
        keys[i] = like_keys[i]
    for i in range(V):
        seen[i] = like_seen[i]


@njit(error_model="numpy")
def ends(job, token):  # type: ignore[no-untyped-def]
    """Whether a drawn token ends its text: a stop id, or what stands for logits from which nothing could be drawn."""
    found = token < 0
    for i in range(job.stops):
        found |= token == integers(job.stop, i, 1)[0]
    return found
