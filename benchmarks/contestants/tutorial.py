"""The same network as tutorials write it: all logits at once, plain AdamW, eager float32.

Attention is there in both forms that tutorials have: explicit scores and mask, and torch's fused function.
"""

# B batch, T tokens, D d_model, H heads

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Ready, timed
from .plain_loop import TrainingShape, random_batch, training_step


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.scale


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, shape: TrainingShape, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.heads, self.width = shape.n_heads, shape.d_model // shape.n_heads
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        angles = torch.arange(shape.length)[:, None] * 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin())
        self.register_buffer("mask", torch.ones(shape.length, shape.length, dtype=torch.bool).tril())

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, self.width).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.rotate(q), self.rotate(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / self.width**0.5  # (B, H, T, T)
            y = scores.masked_fill(~self.mask, float("-inf")).softmax(dim=-1) @ v
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, shape: TrainingShape, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(shape.d_model), RMSNorm(shape.d_model)
        self.attn = Attention(shape, fused)
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class LanguageModel(nn.Module):
    def __init__(self, shape: TrainingShape, fused: bool) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.Sequential(*(Block(shape, fused) for _ in range(shape.n_layers)))
        self.norm = RMSNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tok_emb(tokens))))


def train(shape: dict[str, int], fused: bool) -> Ready:
    """Whole training steps: forward, loss, backward, clipping, AdamW."""
    size = TrainingShape(**shape)
    model = LanguageModel(size, fused)
    tokens = random_batch(size)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    step = training_step(model, loss, "float32", fused=False)
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Ready(lambda: timed(step), size.batch * size.length, about)
