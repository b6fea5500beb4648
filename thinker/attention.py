"""Attention's arithmetic: the plain form, and the fast ones, each equal to it.

`attend` is the one place that chooses between them. Projections, norms and the cache live in `model.py` and `cache.py`.
"""

# B batch, T new tokens, S cached + new, H query heads, G key/value heads, R = H / G

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x (B, H, T, head_dim) by its angle: RoPE, arXiv 2104.09864.

    cos and sin broadcast to (B, 1, T, head_dim / 2) in float32, so that the product is exact enough at any position
    even where x is bfloat16.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention of q (B, H, T, head_dim) over k and v (B, G, S, head_dim): (B, H, T, head_dim).

    visible: bool, broadcasting to (B, 1, T, S), true where a query may look. Without it a query sees every key, or,
    when causal (T must equal S then), those up to its own place.
    """
    assert visible is None or not causal, "a mask says it all: causality must be in it"
    assert not causal or q.shape[2] == k.shape[2], "causal attention without a mask needs as many keys as queries"
    blocks_pay = causal and q.device.type == "cpu" and q.requires_grad and q.shape[2] > QUERY_BLOCK
    if blocks_pay:
        return blocked_causal(q, k, v)
    # For rows of few bfloat16 positions the fused kernel, with its backward, takes two to seven times as long.
    if q.device.type == "cpu" and q.requires_grad and q.dtype == torch.bfloat16 and not causal and short(q, k):
        return masked(q, k, v, visible)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


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
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(q.dtype)
    return weights @ v, weights


def blocked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in blocks of queries, each against its own prefix of the keys.

    On a processor this trains faster than the fused kernel, whose backward is slow there: the blocks are plain matrix
    products, about half of the masked square is never computed, and no score matrix is larger than a block's.
    """
    B, H, T, width = q.shape
    G = k.shape[1]
    q = (q * width**-0.5).view(B, G, H // G, T, width)
    k_turned = k.transpose(-2, -1).unsqueeze(2)  # (B, G, 1, head_dim, T)
    v = v.unsqueeze(2)  # (B, G, 1, T, head_dim)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = q[..., start:end, :] @ k_turned[..., :end]  # (B, G, R, block, end)
        # Added in float32, which widens the scores, rather than filled in: backwards that costs nothing.
        future = torch.full((end - start, end), -torch.inf, dtype=torch.float32, device=q.device).triu(start + 1)
        outputs.append((scores + future).softmax(dim=-1).to(q.dtype) @ v[..., :end, :])
    return torch.cat(outputs, dim=-2).view(B, H, T, width)


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
