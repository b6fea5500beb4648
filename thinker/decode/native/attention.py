"""The attention half of a block, three phases: q, k and v; attention; the output projection.

Who computes which head or column is decided by `share`; every number is one thread's work from its first term to its
last. See `forward.py` for how phases follow each other.
"""

# N rows, D d_model, H query heads, G key/value heads

from __future__ import annotations

from numba import njit

from ...compiled.calls import call
from ...compiled.memory import floats, integers, shorts
from ...compiled.shares import share
from .ahead import pieces
from .elementwise import norm, rotate, softmax, to_float16
from .layout import CHUNK, FLOAT16, PANEL, Q8
from .rows import to_int16
from .shares import share_of_attention, share_of_heads


@njit(error_model="numpy")
def taken(s, own, x, x_at, x_step, rows, k):  # type: ignore[no-untyped-def]
    """Rows as `multiply` takes them, address, place and stride: as they are, or in INT8 rounded, the thread's own."""
    if s.kind != Q8:
        return x, x_at, x_step
    to = own + 4 * s.at_rounded
    for row in range(rows):
        to_int16(x, x_at + row * x_step, k, to, row * s.step_rounded)
    return to, 0, s.step_rounded


@njit(error_model="numpy", inline="always")
def multiply(me, s, x, x_at, x_step, rows, w_at, w_step, panels, k, out, out_at, out_step):  # type: ignore[no-untyped-def]
    """A product of rows that `taken` gave with the model's weights, in the type they have."""
    w, abreast, kind, scales, ahead = s.weights, s.abreast, s.kind, s.scales, pieces(me, s)
    call(
        s.product, x, x_at, x_step, rows, w, w_at, w_step, panels, abreast, kind, scales, k, ahead,
        out, out_at, out_step,
    )  # fmt: skip


@njit(error_model="numpy", inline="always")
def multiply_others(me, s, x, x_at, x_step, rows, kind, w, w_at, w_step, panels, k, out, out_at, out_step):  # type: ignore[no-untyped-def]
    """A product with other panels, float32 or float16."""
    ahead = pieces(me, s)
    call(s.product, x, x_at, x_step, rows, w, w_at, w_step, panels, CHUNK, kind, 0, k, ahead, out, out_at, out_step)


@njit(error_model="numpy")
def norm_rows(s, own, scale_at, first, last):  # type: ignore[no-untyped-def]
    """RMSNorm of rows first to last - 1 of x into the thread's own rows."""
    scale = floats(s.floats, scale_at, s.d_model)
    for row in range(first, last):
        norm(floats(s.x, row * s.d_model, s.d_model), scale, s.eps, floats(own, row * s.d_model, s.d_model))


@njit(error_model="numpy")
def project(me, s, job, layer):  # type: ignore[no-untyped-def]
    """q, k and v of some heads, normed and turned: q into the work space, k and v into the cache."""
    D, own = s.d_model, s.own + me * s.step_own
    at, at_floats = s.at_layers + layer * s.step_layer, s.at_layer_floats + layer * s.step_layer_floats
    norm_rows(s, own, at_floats, 0, job.rows)
    x, at_x, step_x = taken(s, own, own, 0, D, job.rows, D)
    for part in range(3):
        head, last = share_of_heads(me, s, job, part)
        while head < last:
            count = min(max(CHUNK // s.head_panels, 1), last - head)
            step = count * s.head_width
            first = at + head * s.head_width * D
            multiply(me, s, x, at_x, step_x, job.rows, first, D * PANEL, count * s.head_panels, D, own, s.at_tile, step)
            for row in range(job.rows):
                for i in range(count):
                    finish_head(s, own, s.at_tile + row * step + i * s.head_width, row, layer, at_floats, head + i)
            head += count


@njit(error_model="numpy", inline="always")
def finish_head(s, own, at, row, layer, at_floats, head):  # type: ignore[no-untyped-def]
    """One head of one row: query heads come first, then those of keys, then those of values."""
    H, G, width, half = s.heads, s.groups, s.width, s.width // 2
    x = floats(own, at, width)
    place = integers(s.places, row, 1)[0]
    cache = integers(s.slots, row, 1)[0] * s.step_slot + layer * s.step_layer_cache
    if head < H + G:
        if s.qk_norm:
            at_norm = s.at_q_norm if head < H else s.at_k_norm
            norm(x, floats(s.floats, at_floats + at_norm, width), s.eps, x)
        cos, sin = floats(s.floats, s.at_cos + place * half, half), floats(s.floats, s.at_sin + place * half, half)
        rotate(floats(own, at, half), floats(own, at + half, half), cos, sin)
    if head < H:
        q = floats(s.q, (row * H + head) * s.head_width, width)
        for i in range(width):
            q[i] = x[i] * s.scale
    elif head < H + G:
        start = cache + (head - H) * s.step_head_cache + place // PANEL * width * PANEL + place % PANEL
        size = width * PANEL  # (width, position % PANEL)
        if s.cached == FLOAT16:
            narrow = shorts(s.keys, start, size)
            for i in range(width):
                narrow[i * PANEL] = to_float16(x[i])
        else:
            k = floats(s.keys, start, size)
            for i in range(width):
                k[i * PANEL] = x[i]
    else:
        start = cache + (head - H - G) * s.step_head_cache + place * PANEL
        for panel in range(s.head_panels):  # (dimension / PANEL, position, dimension % PANEL)
            to = start + panel * s.capacity * PANEL
            source = floats(own, at + panel * PANEL, PANEL)  # what is beyond `width` is the product with padding, zeros
            if s.cached == FLOAT16:
                narrow = shorts(s.values, to, PANEL)
                for i in range(PANEL):
                    narrow[i] = to_float16(source[i])
            else:
                v = floats(s.values, to, PANEL)
                for i in range(PANEL):
                    v[i] = source[i]


@njit(error_model="numpy")
def narrow(me, threads, s, drafting, slot, first, last):  # type: ignore[no-untyped-def]
    """A slot's keys and values, of positions first to last - 1, as float16 into the caches of the model that drafts."""
    item, end = share(me, threads, s.layers * s.groups)
    begin, panels = first // PANEL, (last + PANEL - 1) // PANEL - first // PANEL  # keys go by whole ones
    step = s.width * PANEL
    while item < end and first < last:
        at = slot * s.step_slot + item // s.groups * s.step_layer_cache + item % s.groups * s.step_head_cache
        start, count = at + begin * step, panels * step
        narrow_row(floats(s.keys, start, count), shorts(drafting.keys, start, count))
        for panel in range(s.head_panels):
            start, count = at + (panel * s.capacity + first) * PANEL, (last - first) * PANEL
            narrow_row(floats(s.values, start, count), shorts(drafting.values, start, count))
        item += 1


@njit(error_model="numpy")
def narrow_row(x, y):  # type: ignore[no-untyped-def]
    """float32 to the bits of float16."""
    for i in range(x.shape[0]):
        y[i] = to_float16(x[i])


@njit(error_model="numpy")
def attend(me, s, job, layer):  # type: ignore[no-untyped-def]
    """Attention of some rows and heads.

    Neighbours in a prompt share the keys of a head, a single token's heads those of their group: either way several
    queries meet the same keys in one product. Which way never changes a bit, only who has how much to do.
    """
    heads, first, last = share_of_attention(me, s, job)
    blocks = (job.rows + job.together - 1) // job.together
    for item in range(first, last):
        row = item % blocks * job.together
        count = min(job.together, job.rows - row)
        attend_to(me, s, job, s.own + me * s.step_own, row, count, item // blocks * heads, heads, layer)


@njit(error_model="numpy", inline="always")
def attend_to(me, s, job, own, row, count, head, heads, layer):  # type: ignore[no-untyped-def]
    """`count` neighbouring rows of a slot by one head, or one row by several heads of one group."""
    H, width, capacity = s.heads, s.width, s.capacity
    places = integers(s.places, row, count)
    visible = places[count - 1] + 1
    cache = integers(s.slots, row, 1)[0] * s.step_slot + layer * s.step_layer_cache
    cache += head // (H // s.groups) * s.step_head_cache
    queries = max(count, heads)
    step_q = s.head_width if heads > 1 else H * s.head_width
    at_q = (row * H + head) * s.head_width
    panels = (visible + PANEL - 1) // PANEL
    scores, step = s.at_scores, width * PANEL
    multiply_others(
        me, s, s.q, at_q, step_q, queries, s.cached, s.keys, cache, step, panels, width, own, scores, capacity
    )
    for query in range(queries):
        sees = visible if heads > 1 else places[query] + 1
        weights = floats(own, scores + query * capacity, sees)
        softmax(weights)
        later = floats(own, scores + query * capacity + sees, visible - sees)
        for i in range(visible - sees):
            later[i] = 0
        if job.traced:
            line = (layer * H + head + (query if heads > 1 else 0)) * job.traced + sees - 1
            kept = floats(job.seen_attention, line * job.traced, sees)
            for i in range(sees):
                kept[i] = weights[i]
    step, to, step_to = capacity * PANEL, s.at_tile, s.head_width
    multiply_others(
        me, s, own, scores, capacity, queries, s.cached, s.values, cache, step, s.head_panels, visible, own, to, step_to
    )
    for query in range(queries):
        place = row * H + head + (query if heads > 1 else query * H)
        y, answer = floats(s.y, place * width, width), floats(own, to + query * step_to, width)
        for i in range(width):
            y[i] = answer[i]


@njit(error_model="numpy")
def add_attention(me, s, job, layer):  # type: ignore[no-untyped-def]
    """x = x + out_proj(y), for some of its columns."""
    D, inner, tile = s.d_model, s.heads * s.width, s.at_tile
    own = s.own + me * s.step_own
    y, at_y, step_y = taken(s, own, s.y, 0, inner, job.rows, inner)
    panel, last = share(me, job.threads, s.model_panels)
    while panel < last:
        count = min(CHUNK, last - panel)
        at = s.at_layers + layer * s.step_layer + s.at_out + panel * inner * PANEL
        multiply(me, s, y, at_y, step_y, job.rows, at, inner * PANEL, count, inner, own, tile, count * PANEL)
        columns = min(count * PANEL, D - panel * PANEL)
        for row in range(job.rows):
            x = floats(s.x, row * D + panel * PANEL, columns)
            more = floats(own, tile + row * count * PANEL, columns)
            for i in range(columns):
                x[i] += more[i]
        panel += count
