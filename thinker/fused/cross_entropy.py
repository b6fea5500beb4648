"""A softmax's cross-entropy and its gradient, as one operation that torch can compile around."""

# N rows, V vocabulary

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiled.processor import LANES
from . import kernels
from .operations import operation

_ADDRESSES = "logits", "targets", "sums", "margins"
TASK = np.dtype([(name, np.int64) for name in (*kernels.SHARED, "rows", "columns", "ignored", *_ADDRESSES)])


def serves(logits: Tensor) -> bool:
    """Whether these logits (N, V) can be taken here."""
    return kernels.serve(logits)


def losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """-log p(target) for each row of logits (N, V), float32; in the logits' place their gradients: they are gone.

    Zero where the target is `ignored`, NaN where it is no column.
    """
    sums, margins = _take_softmax(logits, targets, ignored)
    return sums.log() + margins


def _empty(logits: Tensor, _targets: Tensor, _ignored: int) -> tuple[Tensor, Tensor]:
    sums, margins = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return sums, margins


@operation("take_softmax", _empty, changed=("logits",))
def _take_softmax(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Of each row the sum of e^(logit - largest), and by how much the target's logit is less than the largest."""
    assert logits.is_contiguous()
    assert targets.dtype == torch.int64
    results = _empty(logits, targets, ignored)
    whole = logits, targets.contiguous(), *results
    addresses = {name: x.data_ptr() for name, x in zip(_ADDRESSES, whole, strict=True)}
    N, V = logits.shape
    fields = {"rows": N, "columns": V, "ignored": ignored, **addresses}
    kernels.perform(kernels.take_softmax[logits.dtype], TASK, fields, 4 * (V + LANES))
    return results
