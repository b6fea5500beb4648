"""The training step that every peer gets: fused AdamW, clipping at 1, autocast for bfloat16, no dropout.

Needs torch alone, as it runs in the environments of all peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingShape:
    """Sizes of a dense model, in Thinker's words, and of its batch."""

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    batch: int
    length: int


def random_batch(shape: TrainingShape) -> Tensor:
    """Tokens (batch, length + 1): inputs, and behind the last one its target."""
    torch.manual_seed(0)
    return torch.randint(shape.vocab_size, (shape.batch, shape.length + 1))


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], precision: str, fused: bool = True
) -> Callable[[], None]:
    """One update of the model by the gradient of `loss`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    bfloat16 = {"float32": False, "bfloat16": True}[precision]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert value.item() > 0

    return step
