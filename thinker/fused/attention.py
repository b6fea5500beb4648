"""Causal attention for training, as one operation that torch can compile around.

Here is what torch sees, and the record that tells the kernels what to do; what they do is in `attention_kernels.py`.
"""

# B batch, T tokens, H query heads, G key/value heads

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compiled.library import Kernel
from . import kernels
from .kernels import LINE
from .operations import operation

BLOCK = 32  # queries that attend together; lengths are padded to a multiple of it, widths must be one
PIECE = 64  # keys, and queries, whose scores are made together on the way back

VIEW = np.dtype([(name, np.int64) for name in ("data", "batch", "head", "token")])  # address, strides in elements
VIEWS = ("q", "k", "v", "y", "y_grad", "q_grad", "k_grad", "v_grad")
_COUNTS = "items length padded heads groups width starts turns cos sin step_angles tops totals"
# Places in a thread's own memory, in bytes; what is `turned` or `paired` is explained in `moves.py`.
_PLACES = """rows keys values flat scores grads weights errors paired inner sums q_rows q_sums k_sums v_sums
    turned_q paired_q turned_y paired_y"""
TASK = np.dtype(
    [(name, np.int64) for name in (*kernels.SHARED, *_COUNTS.split(), *_PLACES.split())]
    + [(name, VIEW) for name in VIEWS]
    + [("factor", np.float32), ("scale", np.float32)]
)


def serves(q: Tensor) -> bool:
    """Whether these queries (B, H, T, head_dim) can attend here, and are not padding for the most part."""
    return q.shape[2] > BLOCK // 2 and fits(q.shape[-1]) and kernels.serve(q)


def fits(width: int) -> bool:
    """Whether heads of this width can attend here."""
    return width % BLOCK == 0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of q (B, H, T, head_dim) over k and v (B, G, T, head_dim): (B, H, T, head_dim).

    All are bfloat16, or all float32.

    starts (B, T), whole numbers that never fall: the first position that each query sees, where that isn't 0. rotation:
    cosines and sines (1 or B, 1, T, head_dim / 2) in float32, by which q and k are turned first.
    """
    cos, sin = (None, None) if rotation is None else rotation
    return _Attended.apply(q, k, v, starts, cos, sin)


def _empty(q: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T = q.shape[:3]
    tops, totals = (q.new_empty(B, H, _padded(T), dtype=torch.float32) for _ in range(2))
    return _like(q), tops, totals


def _meanwhile(q: Tensor, k: Tensor, *_: Tensor | None) -> int:
    """The bytes of all threads' own memory, much where tokens and threads are many."""
    T, width = q.shape[2:]
    return math.prod(kernels.shares(_places(_padded(T), width, q.itemsize)[1], k.shape[0] * k.shape[1]))


@operation("attend", _empty, meanwhile=_meanwhile)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, and of each query factor times its largest score and its weights' sum."""
    results = _empty(q)
    y, tops, totals = results
    _perform(kernels.attend_forward, {"q": q, "k": k, "v": v, "y": y}, starts, cos, sin, tops, totals)
    return results


def _empty_gradients(
    y_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


@operation("attend_backward", _empty_gradients, meanwhile=lambda _, *inputs: _meanwhile(*inputs))
def _backward(
    y_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    y: Tensor,
    tops: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    results = _empty_gradients(y_grad, q, k, v)
    views = {"q": q, "k": k, "v": v, "y": y, "y_grad": y_grad}
    grads = dict(zip(("q_grad", "k_grad", "v_grad"), results, strict=True))
    _perform(kernels.attend_backward, views | grads, starts, cos, sin, tops, totals)
    return results


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Any) -> Tensor:  # type: ignore[no-untyped-def]
        results = _forward(*inputs)
        ctx.save_for_backward(*inputs, *results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return *_backward(y_grad, *ctx.saved_tensors), None, None, None


def _like(x: Tensor) -> Tensor:
    """An empty tensor of that shape (B, H, T, head_dim) whose heads lie side by side, as projections want them."""
    B, H, T, width = x.shape
    return x.new_empty(B, T, H, width).transpose(1, 2)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _perform(
    either: Mapping[torch.dtype, Kernel],
    views: dict[str, Tensor],
    starts: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    tops: Tensor,
    totals: Tensor,
) -> None:
    """Have the kernel for such numbers done by all of torch's threads."""
    q = views["q"]
    B, H, T, width = q.shape
    G, padded = views["k"].shape[1], _padded(T)
    firsts = torch.zeros(B, padded, dtype=torch.int32)
    if starts is not None:
        firsts[:, :T] = starts
    angles = [torch.empty(0) if part is None else part.contiguous() for part in (cos, sin)]
    places, size = _places(padded, width, q.itemsize)
    numbers = {
        "items": B * G,
        "length": T,
        "padded": padded,
        "heads": H,
        "groups": G,
        "width": width,
        "starts": firsts.data_ptr(),
        "turns": cos is not None,
        "cos": angles[0].data_ptr(),
        "sin": angles[1].data_ptr(),
        "step_angles": 0 if len(angles[0]) < B else angles[0].stride(0),
        "tops": tops.data_ptr(),
        "totals": totals.data_ptr(),
        "scale": width**-0.5,
        "factor": width**-0.5 / math.log(2),
    }
    whole = {name: kernels.along(x) for name, x in views.items()}
    fields = {name: (x.data_ptr(), *x.stride()[:3]) for name, x in whole.items()}
    kernels.perform(either[q.dtype], TASK, numbers | places | fields, size, B * G)


@cache
def _places(padded: int, width: int, size: int) -> tuple[dict[str, int], int]:
    """Where a thread has what, numbers of so many bytes, and how many bytes that takes in all."""
    rows, words = padded * width, (padded + 2 * BLOCK) * width
    block = max(BLOCK * padded, PIECE * PIECE)
    sizes = {
        **dict.fromkeys(("rows", "values", "paired_q", "paired_y"), size * rows),
        **dict.fromkeys(("keys", "flat", "turned_q", "turned_y"), size * words),
        **dict.fromkeys(("q_rows", "k_sums", "v_sums"), 4 * rows),
        **dict.fromkeys(("scores", "grads"), 4 * block),
        **dict.fromkeys(("weights", "errors", "paired"), size * block),
        "inner": 4 * padded,
        "sums": 4 * BLOCK * width,
        "q_sums": 4 * words,
    }
    places, at = {}, 0
    for name in _PLACES.split():
        places[name] = at
        at += -(-sizes[name] // LINE) * LINE + LINE  # one more, so that not all begin in the same place of a cache
    return places, at
