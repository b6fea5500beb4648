"""The forward once more in its plain form, keeping what a person wants to see: attention, routing, norms.

It runs the model's own modules, but attention through `attention.plain`, so that its logits also prove the fast path.
"""

# B batch, T tokens, H query heads, E experts, K experts per token, L layers, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention, moe
from .model import Block, ThinkerLM


@dataclass(frozen=True)
class Trace:
    """What one forward computed on the way."""

    logits: Tensor  # (B, T, V)
    attention: tuple[Tensor, ...]  # per layer (B, H, T, T), each row sums to 1
    experts: tuple[Tensor, ...]  # per layer (B, T, K), the chosen experts, best first; empty without experts
    expert_weights: tuple[Tensor, ...]  # per layer (B, T, K), sum to 1
    norms: Tensor  # (L + 1, B, T), length of the stream's vectors after the embedding and after each block


@torch.no_grad()
def trace(model: ThinkerLM, tokens: Tensor | None = None, *, embeddings: Tensor | None = None) -> Trace:
    """Run tokens (B, T) or embeddings (B, T, D) without dropout. Raises `ValueError` as the model does."""
    x = model.embed(tokens, embeddings)
    positions, _ = model.places(x.shape[0], x.shape[1], None, None, x.device)
    rotation = model.rope(positions)
    weights, experts, expert_weights, norms = [], [], [], [x.norm(dim=-1)]
    for block in model.blocks:
        assert isinstance(block, Block)
        q, k, v = block.attn.project(block.norm1(x), rotation)
        y, seen = attention.plain(q, k, v, causal=True)
        y = block.attn.out_proj(y.transpose(1, 2).flatten(start_dim=2))
        x = x + (y if block.scale1 is None else y * block.scale1)
        y, router_logits = block.feed_forward(block.norm2(x))
        x = x + (y if block.scale2 is None else y * block.scale2)
        weights.append(seen)
        norms.append(x.norm(dim=-1))
        if router_logits is not None:
            shares, chosen = moe.choose(router_logits, model.config.num_experts_per_tok)
            experts.append(chosen)
            expert_weights.append(shares)
    logits = model.head(model.norm(x))
    return Trace(logits, tuple(weights), tuple(experts), tuple(expert_weights), torch.stack(norms))
