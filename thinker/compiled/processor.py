"""What this processor has, as far as the kernels' form depends on it (what is decoded never does), and how many."""

from __future__ import annotations

import os
import platform
import sys

try:
    from llvmlite import binding
except ImportError:  # then there are no kernels, whose form it could be
    _FEATURES, _NAME = {}, ""
else:
    _FEATURES, _NAME = binding.get_host_cpu_features(), binding.get_host_cpu_name()

MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())

LANES = 16  # float32 numbers in a vector; LLVM splits it on processors with narrower registers
# Thirty-two registers of sixteen float32 numbers, where others have sixteen of eight, or thirty-two of four.
WIDE = _FEATURES.get("avx512f", False)
# Outputs side by side in memory, whose sums fill them with so many rows; or with fewer rows, those of 32 outputs.
PANEL, TALL, LOW = (2 * LANES, 8, 4) if WIDE else (LANES, 6, 2)
# One instruction multiplies 64 pairs of bytes and adds them up in fours.
DOTS = _FEATURES.get("avx512vnni", False)
# One instruction multiplies sixteen pairs of int16 and adds them up in twos.
PAIRS = _FEATURES.get("avx2", False)
# Older processors lack the instruction that makes float32 of float16.
CONVERTS = MACHINE == "aarch64" or _FEATURES.get("f16c", False)
# Bytes that are worth fetching long before they are used, and how many of them while a block is multiplied, as
# measured: Zen 4 keeps near what falls out of a core's own cache, and its memory is quick; Zen 3's cache has to hold
# them, and its memory answers more slowly; Emerald Rapids is the slower for it.
_ZEN = _NAME.startswith("znver")
FETCHED, PIECE = (0, 2048) if not _ZEN else (1 << 24, 2048) if WIDE else (1 << 21, 512)
# Into which cache a product's next weights come, counted from memory, and for how many turns of rows at least. With
# fewer, Emerald Rapids foresees them by itself, and is done a fifth sooner; its nearest cache holds the present ones.
NEXT_INTO, FETCHING_TURNS = (3, 1) if _ZEN else (2, 3)
# Bytes that a single stream of weights is asked for ahead.
STREAM = 8192 if _ZEN else 4096
# One instruction multiplies eight pairs of float32 numbers and adds them to others, rounding once.
JOINS_PRODUCTS = PAIRS and _FEATURES.get("fma", False)
# One instruction multiplies matrices of bfloat16, 16 by 32 times 32 by 16; or 32 pairs, which it adds up in twos.
TILES = _FEATURES.get("amx-bf16", False)
PAIRS_OF_BFLOAT16 = _FEATURES.get("avx512bf16", False)
# Intel's processors that have tiles take such pairs at half the rate of float32, as measured on Emerald Rapids under a
# system that keeps the tiles to itself.
SLOW_PAIRS = "rapids" in _NAME and not TILES
# Torch's library of float32 products has one kernel for all of AMD's processors, and takes a fifth to a third longer
# than ours, as measured on Zen 3.
NEGLECTED = JOINS_PRODUCTS and _ZEN and not WIDE


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
