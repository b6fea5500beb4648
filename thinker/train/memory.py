"""What trades time for memory in training, and how running out of memory is told from other failures."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..model import ThinkerLM

# torch's own allocator on a processor, oneDNN's, and C++'s have no exception of their own in Python.
ALLOCATORS_COMPLAIN = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")


def checkpoint_activations(model: ThinkerLM) -> None:
    """Keep only each block's input for the backward pass and compute the rest again there (arXiv 1604.06174)."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a forward or backward pass is an allocator's, so that a smaller batch may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS_COMPLAIN)
