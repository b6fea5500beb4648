"""Activations, and what SwiGLU does with one: the plain form, and the fast one that equals it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .config import Activation
from .fused import gating

Activate = Callable[[Tensor], Tensor]


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)² (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Activate] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": squared_relu,
}


def gated(activate: Activate, gate: Tensor, up: Tensor) -> Tensor:
    """activate(gate) * up."""
    if activate is F.silu and gating.serves(gate):
        return gating.gated(gate, up)
    return activate(gate) * up
