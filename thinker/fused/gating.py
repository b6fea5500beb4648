"""SwiGLU's activation, silu(gate) * up, as one operation that torch can compile around."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compiled.library import Kernel
from ..compiled.processor import LANES
from . import kernels
from .operations import operation

_ADDRESSES = "gate", "up", "y", "y_grad", "gate_grad", "up_grad"
TASK = np.dtype([(name, np.int64) for name in (*kernels.SHARED, "vectors", *_ADDRESSES)])


def serves(gate: Tensor) -> bool:
    """Whether this gate (…, F) is one of a training that can be done here."""
    return gate.requires_grad and fits(gate.shape[-1]) and kernels.serve(gate)


def fits(width: int) -> bool:
    """Whether gates of this width can be taken here."""
    return width % LANES == 0


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (…, F)."""
    return _Gated.apply(gate, up)


def _empty_result(gate: Tensor, _up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@operation("gate", _empty_result)
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _empty_result(gate, up)
    _perform(kernels.gate_forward, gate=gate, up=up, y=y)
    return y


def _empty_gradients(_y_grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@operation("gate_backward", _empty_gradients)
def _backward(y_grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    results = _empty_gradients(y_grad, gate, up)
    _perform(kernels.gate_backward, y_grad=y_grad, gate=gate, up=up, gate_grad=results[0], up_grad=results[1])
    return results


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        return _backward(y_grad, *ctx.saved_tensors)


def _perform(either: Mapping[torch.dtype, Kernel], **tensors: Tensor) -> None:
    whole = {name: x.contiguous() for name, x in tensors.items()}
    addresses = {name: x.data_ptr() for name, x in whole.items()}
    gate = whole["gate"]
    kernels.perform(either[gate.dtype], TASK, {"vectors": gate.numel() // LANES, **addresses})
