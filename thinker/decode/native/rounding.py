"""Weights in float32 panels rounded to the same panels in INT8, with the numbers of Q8_0.

`formats/q8.py` says which numbers these are and rounds what lies row by row; this is the same for what a decoder has in
memory already, several times as fast.
"""

from __future__ import annotations

import numpy as np

from ...compiled.memory import bytes_, floats, shorts
from .elementwise import to_float16
from .layout import BLOCK, GROUP, PANEL

SIZE = BLOCK * PANEL  # weights that share a line of scales


def round_panels(wide, count, narrow, scales, scratch):  # type: ignore[no-untyped-def]
    """Round `count` weights: 1, or 0 as soon as a scale leaves float16. All but the count are addresses.

    `scratch` is work space for two numbers an output of a panel. Bytes are written without a sign, as `rows.to_int16`
    explains.
    """
    largest, factor = floats(scratch, 0, PANEL), floats(scratch, PANEL, PANEL)
    for start in range(0, count, SIZE):
        weights, quants = floats(wide, start, SIZE), bytes_(narrow, start, SIZE)
        halves = shorts(scales, start // BLOCK, PANEL)
        for lane in range(PANEL):
            largest[lane] = np.float32(0)
        for j in range(BLOCK):
            for lane in range(PANEL):
                largest[lane] = max(largest[lane], abs(weights[j * PANEL + lane]))
        fits = True
        for lane in range(PANEL):
            scale = largest[lane] / np.float32(127)
            fits &= scale <= np.float32(65504)
            halves[lane] = to_float16(scale)
            factor[lane] = np.float32(1) / scale if scale >= np.float32(2.0**-126) else np.float32(0)
        if not fits:
            return 0
        for j in range(BLOCK):
            place = j // GROUP * GROUP * PANEL + j % GROUP
            for lane in range(PANEL):
                scaled = weights[j * PANEL + lane] * factor[lane]
                size = abs(scaled)
                whole = np.int32(size)
                whole += np.int32(np.float32(2) * (size - np.float32(whole)))  # half away from zero
                quants[place + lane * GROUP] = np.int8((-whole if scaled < 0 else whole) ^ -128)
    return 1
