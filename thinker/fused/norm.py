"""RMSNorm as one operation, for training that isn't compiled: a compiler makes one pass of it and what surrounds it."""

# N rows, W width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compiled.library import Kernel
from ..compiled.processor import LANES
from . import kernels
from .operations import operation

ROWS = 64  # whose shares of the scale's gradient are added up together, whatever the number of threads

VIEW = np.dtype([(name, np.int64) for name in ("data", "outer", "middle", "inner")])  # address, strides in elements
VIEWS = ("x", "y", "y_grad", "x_grad")
_COUNTS = "rows middle inner width scale sums"
TASK = np.dtype(
    [(name, np.int64) for name in (*kernels.SHARED, *_COUNTS.split())]
    + [(name, VIEW) for name in VIEWS]
    + [("eps", np.float32)]
)


def serves(x: Tensor, scale: Tensor) -> bool:
    """Whether these rows (…, W), of four dimensions at most, are some of a training that can be done here."""
    return (
        x.requires_grad
        and not torch.compiler.is_compiling()
        and x.dim() <= 4
        and x.shape[-1] == len(scale)
        and fits(x.shape[-1])
        and scale.dtype == torch.float32
        and kernels.serve(x, wide=True)
    )


def fits(width: int) -> bool:
    """Whether rows of this width can be normed here."""
    return width % LANES == 0


def normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * scale for each row, in float32 between."""
    return _Normed.apply(x, scale, eps)


def _empty_result(x: Tensor, _scale: Tensor, _eps: float) -> Tensor:
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


@operation("norm", _empty_result)
def _forward(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    y = _empty_result(x, scale, eps)
    _perform(kernels.norm_forward, {"x": x, "y": y}, scale, eps)
    return y


def _empty_gradients(_y_grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    W = x.shape[-1]
    return _empty_result(x, scale, eps), scale.new_empty(-(-x.numel() // (W * ROWS)), W)


@operation("norm_backward", _empty_gradients)
def _backward(y_grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the scale by each ROWS rows, (N / ROWS, W)."""
    results = x_grad, sums = _empty_gradients(y_grad, x, scale, eps)
    _perform(kernels.norm_backward, {"x": x, "y_grad": y_grad, "x_grad": x_grad}, scale, eps, sums.data_ptr())
    return results


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return _forward(x, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, scale = ctx.saved_tensors
        x_grad, sums = _backward(y_grad, x, scale, ctx.eps)
        return x_grad, sums.sum(dim=0), None


def _perform(
    either: Mapping[torch.dtype, Kernel], views: dict[str, Tensor], scale: Tensor, eps: float, sums: int = 0
) -> None:
    deep = {name: kernels.along(x)[(None,) * (4 - x.dim())] for name, x in views.items()}
    outer, middle, inner, W = deep["x"].shape
    scale = scale.contiguous()
    fields = {name: (x.data_ptr(), *x.stride()[:3]) for name, x in deep.items()}
    numbers: dict[str, Any] = {
        "rows": outer * middle * inner,
        "middle": middle,
        "inner": inner,
        "width": W,
        "scale": scale.data_ptr(),
        "sums": sums,
        "eps": eps,
    }
    kernels.perform(either[deep["x"].dtype], TASK, numbers | fields)
