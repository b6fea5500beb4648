"""The other half of a block, two phases: into the hidden layer of the MLP or of the chosen experts, and back.

An MLP is treated as one expert that every row has chosen. For a mixture each thread sorts the rows by expert for itself
and then makes its own columns of each expert, so that an expert's weights are read once however many rows chose it.
"""

# N rows, D d_model, E experts, K experts per token; a pair is a row with one of its experts

from __future__ import annotations

import numpy as np
from numba import njit

from ...compiled.memory import floats, integers
from ...compiled.shares import share
from .attention import multiply, multiply_others, norm_rows, taken
from .elementwise import activate, softmax
from .layout import CHUNK, FLOAT32, PANEL


@njit(error_model="numpy")
def expand(me, s, job, layer):  # type: ignore[no-untyped-def]
    """Some columns of the hidden layer: act(gate(x)) * up(x), or act(up(x)) in the plain MLP."""
    D, each, tile = s.d_model, 1 + s.gated, s.at_tile
    own = s.own + me * s.step_own
    at_floats = s.at_layer_floats + layer * s.step_layer_floats
    norm_rows(s, own, at_floats + s.at_norm2, 0, job.rows)
    at_x = 0
    if s.mixture:
        route(me, s, job, layer)
        at_x = s.at_gathered
    x, at_x, step_x = taken(s, own, own, at_x, D, job.rows * s.chosen, D)
    for expert in range(s.experts):
        start, count = pairs_of(me, s, job, expert)
        panel, last = share(me, job.threads, s.ff_panels)
        while panel < last and count > 0:
            width = min(CHUNK // each, last - panel)
            step = width * each * PANEL
            at = s.at_layers + layer * s.step_layer + s.at_up + expert * s.step_up + panel * each * D * PANEL
            multiply(me, s, x, at_x + start * step_x, step_x, count, at, D * PANEL, width * each, D, own, tile, step)
            for row in range(count):
                for i in range(width):
                    hidden = floats(s.hidden, (start + row) * s.ff_width + (panel + i) * PANEL, PANEL)
                    made = floats(own, tile + row * step + i * each * PANEL, PANEL)
                    up = floats(own, tile + row * step + i * each * PANEL + PANEL, PANEL)
                    activate(s.activation, made)
                    for j in range(PANEL):
                        hidden[j] = made[j] * up[j] if s.gated else made[j]
            panel += width


@njit(error_model="numpy", inline="always")
def pairs_of(me, s, job, expert):  # type: ignore[no-untyped-def]
    """The first pair of an expert, and how many it has."""
    if not s.mixture:
        return 0, job.rows
    first = integers(s.plan + me * s.step_plan, s.at_first + expert, 2)
    return first[0], first[1] - first[0]


@njit(error_model="numpy")
def contract(me, s, job, layer):  # type: ignore[no-untyped-def]
    """x = x + down(hidden), for some of its columns; of several experts the weighted sum, the best one first."""
    D, F, K, tile = s.d_model, s.d_ff, s.chosen, s.at_tile
    own = s.own + me * s.step_own
    hidden, at_hidden, step_hidden = taken(s, own, s.hidden, 0, s.ff_width, job.rows * K, F)
    panel, last = share(me, job.threads, s.model_panels)
    while panel < last:
        width = min(CHUNK, last - panel)
        step = width * PANEL
        for expert in range(s.experts):
            start, count = pairs_of(me, s, job, expert)
            at = s.at_layers + layer * s.step_layer + s.at_down + expert * s.step_down + panel * F * PANEL
            multiply(
                me, s, hidden, at_hidden + start * step_hidden, step_hidden, count, at, F * PANEL, width, F, own,
                tile + start * step, step,
            )  # fmt: skip
        columns = min(step, D - panel * PANEL)
        for row in range(job.rows):
            x = floats(s.x, row * D + panel * PANEL, columns)
            if not s.mixture:
                y = floats(own, tile + row * step, columns)
                for i in range(columns):
                    x[i] += y[i]
                continue
            shares, pairs = (
                floats(own, s.at_shares + row * K, K),
                integers(s.plan + me * s.step_plan, s.at_pair + row * K, K),
            )
            mixed = floats(own, tile + pairs[0] * step, columns)
            for i in range(columns):
                mixed[i] *= shares[0]
            for choice in range(1, K):
                y = floats(own, tile + pairs[choice] * step, columns)
                for i in range(columns):
                    mixed[i] += y[i] * shares[choice]
            for i in range(columns):
                x[i] += mixed[i]
        panel += width


@njit(error_model="numpy")
def route(me, s, job, layer):  # type: ignore[no-untyped-def]
    """Choose K experts for each row, of equals the lower number, sort the pairs by expert and gather their rows.

    Two rows with two experts each, 3 and 0, then 0 and 1: `first` becomes 0, 2, 3, 3, 4 (expert 0 has pairs 0 and 1),
    `source` 0, 1, 1, 0 (the row of each pair), `pair` 3, 0, 1, 2 (where each row's choices went).
    """
    D, E, K, n = s.d_model, s.experts, s.chosen, job.rows
    own, plan = s.own + me * s.step_own, s.plan + me * s.step_plan
    panels = (E + PANEL - 1) // PANEL
    at = s.at_layer_floats + layer * s.step_layer_floats + s.at_router
    multiply_others(me, s, own, 0, D, n, FLOAT32, s.floats, at, D * PANEL, panels, D, own, s.at_tile, panels * PANEL)
    first, pair, source = (
        integers(plan, s.at_first, E + 1),
        integers(plan, s.at_pair, n * K),
        integers(plan, s.at_source, n * K),
    )
    for expert in range(E + 1):
        first[expert] = 0
    for row in range(n):
        logits = floats(own, s.at_tile + row * panels * PANEL, E)
        shares = floats(own, s.at_shares + row * K, K)
        for choice in range(K):
            best = 0
            for expert in range(1, E):
                if logits[expert] > logits[best]:
                    best = expert
            shares[choice] = logits[best]
            logits[best] = -np.inf
            pair[row * K + choice] = best
            first[best + 1] += 1
        softmax(shares)
        if job.traced and me == 0:
            line = (layer * job.traced + integers(s.places, row, 1)[0]) * K
            for choice in range(K):
                integers(job.seen_experts, line + choice, 1)[0] = pair[row * K + choice]
                floats(job.seen_shares, line + choice, 1)[0] = shares[choice]
    for expert in range(E):
        first[expert + 1] += first[expert]
    # Each pair goes to its expert's next place, which moves `first` on by one expert; then it is moved back.
    for i in range(n * K):
        expert = pair[i]
        pair[i] = first[expert]
        source[pair[i]] = i // K
        first[expert] += 1
    for expert in range(E, 0, -1):
        first[expert] = first[expert - 1]
    first[0] = 0
    for i in range(n * K):
        normed, gathered = floats(own, source[i] * D, D), floats(own, s.at_gathered + i * D, D)
        for j in range(D):
            gathered[j] = normed[j]
