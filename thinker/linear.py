"""Products with weights, y = x Wᵀ: torch's, and the fast form of their gradient, which equals its."""

# M outputs, K inputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fused import weights


class Linear(nn.Linear):
    """A layer without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) to (…, M)."""
        if weights.serves(x, self.weight):
            return _Product.apply(x, self.weight)
        return super().forward(x)


class _Product(torch.autograd.Function):
    """The same, as autocast has it; the weights' gradient is added up in float32 and rounded once, if at all."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        narrow, matrix = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(narrow, matrix)
        ctx.dtypes = x.dtype, weight.dtype
        return F.linear(narrow, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[no-untyped-def]
        narrow, matrix = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        x_grad = (upstream @ matrix).to(x_dtype) if ctx.needs_input_grad[0] else None
        weight_grad = weights.gradient(upstream.flatten(0, -2), narrow.flatten(0, -2))
        return x_grad, weight_grad.to(weight_dtype)
