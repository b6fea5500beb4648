"""Products with weights, y = x Wᵀ: torch's, and the fast forms of them and of their gradients, which equal its."""

# M outputs, K inputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fused import products, weights


class Linear(nn.Linear):
    """A layer without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) to (…, M)."""
        trained = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)
        if trained and (weights.serves(x, self.weight) or products.serves(x, self.weight.T)):
            return _Product.apply(x, self.weight)
        return super().forward(x)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, of x (N, K) and weight (M, K) of one type, without a gradient: (N, M)."""
    return products.product(x, weight.T) if products.serves(x, weight.T) else F.linear(x, weight)


class _Product(torch.autograd.Function):
    """The same, as autocast has it; the weights' gradient is added up in float32 and rounded once, if at all."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows, matrix = x.flatten(0, -2).to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, matrix)
        ctx.dtypes = x.dtype, weight.dtype
        return project(rows, matrix).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        rows, matrix = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        y_grad, x_grad, weight_grad = upstream.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            x_grad = products.times(y_grad, matrix).to(x_dtype).unflatten(0, upstream.shape[:-1])
        if ctx.needs_input_grad[1]:
            by_tiles = rows.dtype == torch.bfloat16
            weight_grad = weights.gradient(y_grad, rows) if by_tiles else products.times(y_grad.T, rows)
            weight_grad = weight_grad.to(weight_dtype)
        return x_grad, weight_grad
