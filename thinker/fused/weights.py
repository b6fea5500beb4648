"""Weights' gradients, added up in float32 over all tokens: where a processor multiplies by tiles."""

# N tokens, M outputs, K inputs, G groups of tokens, of which each has its own weights

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiled.processor import TILES
from . import kernels
from .kernels import STEP
from .operations import operation

# A block of the gradient, and its tokens at a time: two tiles' rows and columns of them are two thirds of the nearest
# cache, and the whole half of a core's own.
ROWS, COLUMNS, TOKENS = 512, 256, 256

_FIELDS = "groups", "ends", "outputs", "inputs", "y_grad", "y_step", "x", "x_step", "grad"
TASK = np.dtype([(name, np.int64) for name in (*kernels.SHARED, *_FIELDS)])


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of these weights (M, K) or (G, M, K), which meet x (…, K) in a training, can be taken here.

    The size of each group must be a multiple of STEP.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    tokens = x.numel() // x.shape[-1]
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and dtype == torch.bfloat16
        and x.device.type == "cpu"
        and tokens > 0
        and x.shape[-1] == weight.shape[-1]
        and (weight.dim() > 2 or tokens % STEP == 0)
        and all(size % STEP == 0 for size in weight.shape[-2:])
        and TILES
        and kernels.is_available(torch.bfloat16)
    )


def _empty(y_grad: Tensor, x: Tensor, ends: Tensor | None = None) -> Tensor:
    groups = () if ends is None else (len(ends),)
    return y_grad.new_empty(*groups, y_grad.shape[1], x.shape[1], dtype=torch.float32)


@operation("weight_gradient", _empty)
def gradient(y_grad: Tensor, x: Tensor, ends: Tensor | None = None) -> Tensor:
    """y_gradᵀ x, (M, K) in float32, of bfloat16 y_grad (N, M) and x (N, K).

    ends (G,), int64: of groups of tokens, one behind the other, for (G, M, K), a gradient each.
    """
    result = _empty(y_grad, x, ends)
    y_grad, x = kernels.along(y_grad), kernels.along(x)
    if ends is None:
        ends = torch.tensor([len(x)])
    else:
        assert not bool((ends % STEP).any()), "groups are of whole steps"
    addresses = y_grad.data_ptr(), 2 * y_grad.stride(0), x.data_ptr(), 2 * x.stride(0), result.data_ptr()
    fields = dict(zip(_FIELDS, (len(ends), ends.data_ptr(), *result.shape[-2:], *addresses), strict=True))
    kernels.perform(kernels.add_products, TASK, fields, 2 * TOKENS * (ROWS + COLUMNS))
    return result
