"""What trades time for memory in training."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from ..model import ThinkerLM


def checkpoint_activations(model: ThinkerLM) -> None:
    """Keep only each block's input for the backward pass and compute the rest again there (arXiv 1604.06174)."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
