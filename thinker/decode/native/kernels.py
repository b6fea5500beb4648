"""The compiled functions of native decoding, for `decoder.py` and `team.py`. To import this compiles nothing.

What they are made of is in the files beside this one that import Numba, which only compiling brings in.
"""

from __future__ import annotations

from pathlib import Path

from ...compiled.library import Kernel
from ...sampling import draw_rows

SOURCES = list(Path(__file__).parent.glob("*.py"))
member = Kernel("thinker.decode.native.member", "member", 3, SOURCES)
network = Kernel("thinker.decode.native.forward", "network", 2, SOURCES)
product = Kernel("thinker.decode.native.product", "product", 16, SOURCES)
round_panels = Kernel("thinker.decode.native.rounding", "round_panels", 5, SOURCES)
ALL = network, draw_rows, member, product, round_panels  # what takes longest to compile first
