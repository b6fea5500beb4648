"""What this processor has, as far as the kernels' form depends on it. What is decoded never does."""

from __future__ import annotations

import platform

from llvmlite import binding

MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
_FEATURES = binding.get_host_cpu_features()

LANES = 16  # float32 numbers in a vector; LLVM splits it on processors with narrower registers
# Thirty-two registers of sixteen float32 numbers, where others have sixteen of eight, or thirty-two of four.
WIDE = _FEATURES.get("avx512f", False)
# So many rows' sums fill them, beside one panel's weights or half of it; or fewer rows'.
TALL, LOW = (8, 4) if WIDE else (6, 2)
# One instruction multiplies 64 pairs of bytes and adds them up in fours.
DOTS = _FEATURES.get("avx512vnni", False)
# One instruction multiplies sixteen pairs of int16 and adds them up in twos.
PAIRS = _FEATURES.get("avx2", False)
# Older processors lack the instruction that makes float32 of float16.
CONVERTS = MACHINE == "aarch64" or _FEATURES.get("f16c", False)
# Bytes that are worth fetching long before they are used: what a core's own cache has room for beside other things, or
# all, as on AMD's, where what falls out of that one stays near.
FETCHED = 1 << 24 if binding.get_host_cpu_name().startswith("znver") else 1 << 19
# One instruction multiplies eight pairs of float32 numbers and adds them to others, rounding once.
JOINS_PRODUCTS = PAIRS and _FEATURES.get("fma", False)
# One instruction multiplies matrices of bfloat16, 16 by 32 times 32 by 16; or 32 pairs, which it adds up in twos.
TILES = _FEATURES.get("amx-bf16", False)
PAIRS_OF_BFLOAT16 = _FEATURES.get("avx512bf16", False)
