"""Attention's arithmetic: the plain form, and the fast ones, each equal to it.

`attend` is the one place that chooses between them. Projections, norms and the cache live in `model.py` and `cache.py`.
"""

# B batch, T new tokens, S cached + new, H query heads, G key/value heads, R = H / G

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import attention as fused

QUERY_BLOCK = 128

Rotation = tuple[Tensor, Tensor]  # cosines and sines


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x (B, H, T, head_dim) by its angle: RoPE, arXiv 2104.09864.

    cos and sin broadcast to (B, 1, T, head_dim / 2) in float32, so that the product is exact enough at any position
    even where x is bfloat16.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def turn(x: Tensor, rotation: Rotation | None) -> Tensor:
    """x turned, unless there is nothing to turn it by."""
    return x if rotation is None else rotate(x, *rotation)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    causal: bool = False,
    starts: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Softmax attention of q (B, H, T, head_dim) over k and v (B, G, S, head_dim): (B, H, T, head_dim).

    q and k are turned by `rotation` first; see `rotate`.

    visible: bool, broadcasting to (B, 1, T, S), true where a query may look. Without it a query sees every key, or,
    when causal (T must equal S then), those up to its own place; in packed rows from the start of its text on, starts
    (B, T), which never fall.
    """
    assert visible is None or not causal, "a mask says it all: causality must be in it"
    assert not causal or q.shape[2] == k.shape[2], "causal attention without a mask needs as many keys as queries"
    assert starts is None or causal, "a text has a start where it is read in order"
    if causal and trains_on_processor(q) and fused.serves(q):
        return fused.attend(q, k, v, starts, rotation)
    q, k = turn(q, rotation), turn(k, rotation)
    if starts is not None:
        visible, causal = seen_from(starts), False
    if trains_on_processor(q):
        if causal and q.shape[2] > QUERY_BLOCK:
            return blocked_causal(q, k, v)
        # For rows of few bfloat16 positions torch's kernel, with its backward, takes two to seven times as long.
        if q.dtype == torch.bfloat16 and not causal and short(q, k):
            return masked(q, k, v, visible)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def seen_from(starts: Tensor) -> Tensor:
    """Who sees whom where rows are packed, bool (B, 1, T, T): a text, (B, T), is known by its start."""
    places = torch.arange(starts.shape[-1], device=starts.device)
    return (starts[:, None, :, None] == starts[:, None, None, :]) & (places <= places[:, None])


def trains_on_processor(q: Tensor) -> bool:
    """Whether torch's own kernel has a rival: on a processor its backward is slow."""
    return q.device.type == "cpu" and q.requires_grad


def plain(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """What every other form must equal, in so many words; also returns the weights (B, H, T, S)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # (B, H, S, head_dim)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, S)
    if causal:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = _widened(scores).softmax(dim=-1).to(q.dtype)
    return weights @ v, weights


def blocked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in blocks of queries, each against its own prefix of the keys.

    On a processor this trains faster than the fused kernel, whose backward is slow there: the blocks are plain matrix
    products, and about half of the masked square is never computed. The other half is kept for the way back.
    """
    B, H, T, width = q.shape
    G = k.shape[1]
    # A place's R queries of a group are neighbours, so that a block is a part of all rows: (B G, T R, head_dim).
    q = (q * width**-0.5).view(B, G, H // G, T, width).transpose(2, 3).reshape(B * G, -1, width)
    y = _BlockedCausal.apply(q, k.reshape(B * G, T, width), v.reshape(B * G, T, width))
    return y.view(B, G, T, H // G, width).transpose(2, 3).reshape(B, H, T, width)


class _BlockedCausal(torch.autograd.Function):
    """Of q (N, T R, head_dim), scaled, and k and v (N, T, head_dim): (N, T R, head_dim).

    What a row's weights have to be divided by, their sum, divides its output instead (arXiv 2205.14135), and its
    gradient on the way back: that leaves little to do for each score, which is what takes the time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        R = q.shape[1] // k.shape[1]
        outputs, sums, weights = [], [], []
        for rows, keys in _blocks(k.shape[1], R):
            scores = _widened(q[:, rows] @ k[:, keys].mT)  # (N, block R, keys)
            row, key = (torch.arange(part.start, part.stop, device=q.device) for part in (rows, keys))
            scores.masked_fill_(key.int() > (row // R).int()[:, None], -torch.inf)  # 32 bits compare faster
            weights.append(scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_().to(q.dtype))
            # Of the rounded weights, so that they add up to one; and an exponential that two read would be stored wide.
            sums.append(weights[-1].sum(dim=-1, keepdim=True, dtype=scores.dtype))
            outputs.append((weights[-1] @ v[:, keys] / sums[-1]).to(q.dtype))
        output = torch.cat(outputs, dim=1)
        ctx.save_for_backward(q, k, v, output, torch.cat(sums, dim=1), *weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        q, k, v, output, sums, *weights = ctx.saved_tensors
        wide = _widened(upstream) / sums
        # What softmax takes off a row's gradients, the sum of weight times gradient, is that of output times gradient.
        inner, upstream = (wide * output).sum(dim=-1, keepdim=True), wide.to(q.dtype)
        blocks = _blocks(k.shape[1], q.shape[1] // k.shape[1])
        q_grads, k_parts, v_parts = [], [], []
        for (rows, keys), part in zip(blocks, weights, strict=True):
            grads = _widened(upstream[:, rows] @ v[:, keys].mT).sub_(inner[:, rows])
            errors = grads.mul_(part).to(q.dtype)  # of the scores
            q_grads.append(errors @ k[:, keys])
            k_parts.append(errors.mT @ q[:, rows])
            v_parts.append(part.mT @ upstream[:, rows])
        return torch.cat(q_grads, dim=1), _added(k_parts), _added(v_parts)


def _blocks(length: int, repeats: int) -> Iterator[tuple[slice, slice]]:
    """The rows of each block of queries, so many a place, and the keys that some of them see."""
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        yield slice(start * repeats, end * repeats), slice(0, end)


def _added(parts: list[Tensor]) -> Tensor:
    """The sum of tensors (N, keys, head_dim), each a block longer than the one before."""
    starts = [0, *(part.shape[1] for part in parts)]
    sums = []
    for i, part in enumerate(parts):
        block = slice(starts[i], starts[i + 1])
        total = _widened(part[:, block])
        for longer in parts[i + 1 :]:
            total = total + longer[:, block]
        sums.append(total.to(part.dtype))
    return torch.cat(sums, dim=1)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def short(q: Tensor, k: Tensor) -> bool:
    """Whether all scores of a head fit into one block."""
    return max(q.shape[2], k.shape[2]) <= QUERY_BLOCK


def masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention as plain matrix products; `visible` as in `attend`, every query sees something."""
    B, H, T, width = q.shape
    G = k.shape[1]
    scores = (q * width**-0.5).view(B, G, H // G, T, width) @ k.transpose(-2, -1).unsqueeze(2)  # (B, G, R, T, S)
    if visible is not None:
        # Added rather than filled in: backwards that costs nothing.
        hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, -torch.inf)
        scores = scores + hidden.unsqueeze(-3)
    return (scores.softmax(dim=-1) @ v.unsqueeze(2)).view(B, H, T, width)
