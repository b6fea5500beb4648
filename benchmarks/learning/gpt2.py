"""The network that nanoGPT trains, in our words: GPT-2's block as its CPU example has it, without biases.

LayerNorm before each branch, learned positions, softmax attention, an MLP with exact GELU four times as wide, the head
tied to the embedding ("Language Models are Unsupervised Multitask Learners"; nanoGPT's `model.py` for initialisation).
It answers to what `NextTokenLoss` asks of a model, so that the same loop trains it.
"""

# B batch, T tokens, D d_model, H heads

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinker.config import ThinkerConfig


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )  # (B, H, T, D / H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).flatten(start_dim=2))
        return x + self.mlp_out(F.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    """Of the config only the sizes count: vocab_size, n_layers, n_heads, d_model, ctx_len."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.ctx_len, config.d_model)
        self.layers = nn.ModuleList(Layer(config.d_model, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the stream is drawn smaller, so that its variance doesn't grow with depth.
                smaller = math.sqrt(2 * config.n_layers) if name.endswith("_out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / smaller)
        self.head.weight = self.tok_emb.weight

    def features(self, tokens: Tensor, **_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stream after the final norm, (B, T, D), and no router."""
        x = self.tok_emb(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x), ()


def optimizer(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW as nanoGPT sets it for a small model: β 0.9 and 0.99, decay on every matrix, embeddings included."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    built = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    for group in built.param_groups:
        group["peak_lr"] = lr
    return built
