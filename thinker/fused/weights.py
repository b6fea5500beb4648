"""Weights' gradients, added up in float32 over all tokens: where a processor multiplies by tiles."""

# N tokens, M outputs, K inputs

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiled.processor import TILES
from . import kernels
from .kernels import NAMESPACE, STEP

# A block of the gradient, and its tokens at a time: two tiles' rows and columns of them are two thirds of the nearest
# cache, and the whole half of a core's own.
ROWS, COLUMNS, TOKENS = 512, 256, 256

_FIELDS = "tokens", "outputs", "inputs", "y_grad", "y_step", "x", "x_step", "grad"
TASK = np.dtype([(name, np.int64) for name in (*kernels.SHARED, *_FIELDS)])


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of these weights (M, K), which meet x (…, K) in a training, can be taken here."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    sizes = x.numel() // weight.shape[1], *weight.shape
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and dtype == torch.bfloat16
        and x.device.type == "cpu"
        and all(size > 0 and size % STEP == 0 for size in sizes)
        and TILES
        and kernels.is_available()
    )


@torch.library.custom_op(f"{NAMESPACE}::weight_gradient", mutates_args=())
def gradient(y_grad: Tensor, x: Tensor) -> Tensor:
    """y_gradᵀ x, (M, K) in float32, of bfloat16 y_grad (N, M) and x (N, K)."""
    result = _empty(y_grad, x)
    y_grad, x = (part if part.stride(1) == 1 else part.contiguous() for part in (y_grad, x))
    (N, M), K = y_grad.shape, x.shape[1]
    addresses = y_grad.data_ptr(), 2 * y_grad.stride(0), x.data_ptr(), 2 * x.stride(0), result.data_ptr()
    fields = dict(zip(_FIELDS, (N, M, K, *addresses), strict=True))
    kernels.perform(kernels.add_products, TASK, fields, 2 * TOKENS * (ROWS + COLUMNS))
    return result


@gradient.register_fake
def _empty(y_grad: Tensor, x: Tensor) -> Tensor:
    return y_grad.new_empty(y_grad.shape[1], x.shape[1], dtype=torch.float32)
