"""The network for up to 64 rows at once, each a token of some slot at some place in it.

Within a phase every thread makes its own share of the outputs, whole; between phases the threads meet, unless each has
made by itself what it needs. What all of them need and what is cheap (norms, routing) each works out for itself, which
costs less than one more meeting. A row's arithmetic is the same whoever its neighbours are and however many threads
there are.
"""

# N rows, D d_model, V vocab_size

from __future__ import annotations

import numpy as np
from numba import njit

from ...compiled.memory import bytes_, floats, integers, shorts
from ...compiled.shares import share
from .ahead import plan_ahead, turn_to
from .attention import add_attention, attend, multiply, norm_rows, project, taken
from .layout import BLOCK, FLOAT32, GROUP, PANEL
from .meetings import barrier
from .mlp import contract, expand
from .records import jobs, shapes
from .rows import sum_of_squares
from .shares import by_whole_groups


def network(me, task):  # type: ignore[no-untyped-def]
    """The network for the rows of the job at an address, once: their vectors x through all layers, and logits."""
    job = jobs(task, 0, 1)[0]
    s = shapes(job.shape, 0, 1)[0]
    if not job.embedded:
        embed(me, s, job)
        barrier(me, job.threads, s.sync)
    plan_ahead(me, s, job)
    for layer in range(s.layers):
        keep_norms(me, s, job, layer)
        project(me, s, job, layer)
        if not by_whole_groups(s, job):
            barrier(me, job.threads, s.sync)
        attend(me, s, job, layer)
        turn_to(me, s, (layer + 1) % s.layers, layer)
        barrier(me, job.threads, s.sync)
        add_attention(me, s, job, layer)
        barrier(me, job.threads, s.sync)
        expand(me, s, job, layer)
        barrier(me, job.threads, s.sync)
        contract(me, s, job, layer)
        barrier(me, job.threads, s.sync)
    keep_norms(me, s, job, s.layers)
    head(me, s, job)
    barrier(me, job.threads, s.sync)
    return 0


@njit(error_model="numpy")
def embed(me, s, job):  # type: ignore[no-untyped-def]
    """x = the tokens' vectors, of some rows."""
    D, beside = s.d_model, s.beside
    first, last = share(me, job.threads, job.rows)
    for row in range(first, last):
        token = integers(s.tokens, row, 1)[0]
        at, lane = s.at_embedding + token // beside * D * beside, token % beside
        x = floats(s.x, row * D, D)
        if s.tokens_kind == FLOAT32:
            column = floats(s.vectors, at + lane, D * beside)
            for i in range(D):
                x[i] = column[i * beside]
        else:
            quants = bytes_(s.vectors, at + lane * GROUP, D * beside)
            scales = shorts(s.scales, at // BLOCK + lane, D // BLOCK * beside)
            for i in range(D):
                # float16 bits to float32: 13 bits more of mantissa, and an exponent that counts from 127 and not 15.
                scale = np.int32(np.int32(scales[i // BLOCK * beside]) << 13).view(np.float32) * np.float32(2.0**112)
                weight = quants[i // GROUP * GROUP * beside + i % GROUP] ^ np.int8(-128)
                x[i] = np.float32(weight) * scale


@njit(error_model="numpy")
def head(me, s, job):  # type: ignore[no-untyped-def]
    """Logits of the rows from `logits_from` on, for some of the vocabulary."""
    D, row = s.d_model, job.logits_from
    own = s.own + me * s.step_own
    norm_rows(s, own, s.at_norm, row, job.rows)
    x, at_x, step_x = taken(s, own, own, row * D, D, job.rows - row, D)
    first, last = share(me, job.threads, s.vocab_panels)
    at, to = s.at_head + first * D * PANEL, row * s.vocab_width + first * PANEL
    multiply(me, s, x, at_x, step_x, job.rows - row, at, D * PANEL, last - first, D, s.logits, to, s.vocab_width)


@njit(error_model="numpy")
def keep_norms(me, s, job, layer):  # type: ignore[no-untyped-def]
    """For a trace: the length of the rows' vectors before a layer, or after the last."""
    if job.traced and me == 0:
        for row in range(job.rows):
            place = layer * job.traced + integers(s.places, row, 1)[0]
            floats(job.seen_norms, place, 1)[0] = np.sqrt(sum_of_squares(floats(s.x, row * s.d_model, s.d_model)))
