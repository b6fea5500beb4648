"""The machine's own limits, in turns with those that are compared with them."""

from __future__ import annotations

from functools import partial

from thinker.bench import limits
from thinker.compiled.processor import processors

from . import Ready, timed


def products(dtype: str) -> Ready:
    """Operations of large matrix products in torch."""
    import torch

    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "operands": f"{limits.SIDE} x {limits.SIDE}",
    }
    return Ready(partial(timed, limits.product(dtype)), limits.PRODUCT, about)


def reading(size: int) -> Ready:
    """Bytes of reading the same `size` bytes again and again."""
    threads = processors()
    return Ready(partial(timed, limits.reader(size, threads)), size * limits.passes(size), {"threads": threads})
