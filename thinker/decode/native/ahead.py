"""What a thread will soon read: pieces of keys and values that its products have fetched on the way, a token's vector.

Attention waits for memory, products for the processor. Where each row has a slot of its own, the caches outgrow the
processor's, and a layer's keys and values come while the layer before is computed, where that is a gain. Nothing is
read, only asked for.
"""

from __future__ import annotations

from numba import njit, types
from numba.extending import intrinsic

from ...compiled.memory import integers, pointer
from ...compiled.vectors import BYTE, fetch
from .layout import FLOAT16, FLOAT32, GROUP, MANY_ROWS, PANEL, PIECE, PIECES
from .shares import share_of_attention

NEXT, COUNT, FIRST = range(3)  # words of a list: the next piece, how many there are, and from here on their addresses


@njit(error_model="numpy", inline="always")
def pieces(me, s):  # type: ignore[no-untyped-def]
    """The address of a thread's list."""
    return s.plan + me * s.step_plan + 8 * s.at_ahead


@njit(error_model="numpy")
def plan_ahead(me, s, job):  # type: ignore[no-untyped-def]
    """List the first layer's pieces in the order in which `attend` takes them; none for neighbours in a slot."""
    words = integers(pieces(me, s), 0, s.ahead)
    count, size = 0, 2 if s.cached == FLOAT16 else 4
    if PIECES > 0 and job.together == 1 and job.rows >= MANY_ROWS:
        heads, first, last = share_of_attention(me, s, job)
        for item in range(first, last):
            row, group = item % job.rows, item // job.rows * heads // (s.heads // s.groups)
            cache = integers(s.slots, row, 1)[0] * s.step_slot + group * s.step_head_cache
            visible = integers(s.places, row, 1)[0] + 1
            panels = (visible + PANEL - 1) // PANEL
            count = add(words, count, s.keys + cache * size, panels * s.width * PANEL * size)
            for panel in range(s.head_panels):
                start = cache + panel * s.capacity * PANEL
                count = add(words, count, s.values + start * size, visible * PANEL * size)
    words[NEXT], words[COUNT] = 0, count
    for i in range(FIRST + count, s.ahead - PIECES + count):  # as many as one product could take
        words[i] = s.x  # what is at hand anyway


@njit(error_model="numpy")
def add(words, count, start, size):  # type: ignore[no-untyped-def]
    """Add the pieces of so many bytes, as far as there is room: how many are listed then."""
    for piece in range(0, size, PIECE):
        if count < PIECES:
            words[FIRST + count] = start + piece
            count += 1
    return count


@njit(error_model="numpy")
def turn_to(me, s, layer, before):  # type: ignore[no-untyped-def]
    """Begin with the pieces of another layer than before."""
    words = integers(pieces(me, s), 0, s.ahead)
    words[NEXT] = 0
    step = (layer - before) * s.step_layer_cache * (2 if s.cached == FLOAT16 else 4)
    for i in range(FIRST, FIRST + words[COUNT]):
        words[i] += step


@njit(error_model="numpy", inline="always")
def take(pieces, count):  # type: ignore[no-untyped-def]
    """The address where the next so many are listed, or, behind the last, places at hand."""
    words = integers(pieces, 0, FIRST)
    at = words[NEXT]
    words[NEXT] = min(at + count, words[COUNT])
    return pieces + 8 * (FIRST + at)


@njit(error_model="numpy")
def ask_for_vector(s, token):  # type: ignore[no-untyped-def]
    """Have a token's vector come, which `embed` will take."""
    beside, group, size = s.beside, 1 if s.tokens_kind == FLOAT32 else GROUP, 4 if s.tokens_kind == FLOAT32 else 1
    at, step = s.at_embedding + token // beside * s.d_model * beside + token % beside * group, group * beside * size
    for further in range(0, s.d_model // group * step, max(step, 64)):
        ask(s.vectors, at * size + further)


@intrinsic
def ask(typing, address, at):  # type: ignore[no-untyped-def]
    """Have a cache line come: the one of byte `at` from the address on."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, at = arguments
        fetch(builder, pointer(builder, address, BYTE, at), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
