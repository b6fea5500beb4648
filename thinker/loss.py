"""What training minimises: cross-entropy of the next token, and the load-balancing loss of a mixture.

`NextTokenLoss` is the module that training, DDP, FSDP and compile wrap. It returns sums and counts, never means: only
the loop knows how many tokens make a step.
"""

# B batch, T tokens, N = B * T, D d_model, V vocabulary, E experts

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fused import cross_entropy as fused
from .fused.products import times
from .linear import project
from .model import ThinkerLM

IGNORE = -100  # a target that doesn't count, as everywhere in torch
# 10 MB in float32 stay near a processor; with fewer rows than that, adding up the head's gradient costs more.
LOGITS_AT_ONCE, FEWEST_ROWS = 5 << 19, 512


class LossParts(NamedTuple):
    """Scalars: the sum of the tokens' losses in nats, how many tokens counted, the mean balance loss of the layers."""

    total: Tensor
    tokens: Tensor
    balance: Tensor


class NextTokenLoss(nn.Module):
    """A model together with its loss."""

    def __init__(self, model: ThinkerLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor | None,
        targets: Tensor,
        segments: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> LossParts:
        """tokens (B, T) or embeddings (B, T, D), targets (B, T) with -100 where nothing is asked.

        segments (B, T) for packed rows: see `ThinkerLM.features`; 0 is padding.
        """
        hidden, router_logits = self.model.features(
            tokens, embeddings=embeddings, attention_mask=attention_mask, segments=segments, return_router=True
        )
        assert isinstance(hidden, Tensor)
        check_targets(targets, hidden, self.model.config.vocab_size)
        total = cross_entropy_sum(hidden.flatten(0, 1), self.model.head.weight, targets.flatten())
        real = attention_mask if segments is None else segments != 0
        balance = balance_loss(tuple(router_logits), real, self.model.config.num_experts_per_tok)
        return LossParts(total, (targets != IGNORE).sum(), balance.to(total.device))


def check_targets(targets: Tensor, hidden: Tensor, vocab_size: int) -> None:
    """Raise `ValueError` for targets that are not one a position, or no ids; values only where reading them is free."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: give torch.int64")
    if targets.shape != hidden.shape[:2]:
        raise ValueError(f"targets are {tuple(targets.shape)}, the input is {tuple(hidden.shape[:2])}: give one each")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))]
        if len(wrong):
            raise ValueError(f"target {int(wrong[0])} is outside the vocabulary of {vocab_size}, and not {IGNORE}")


def rows_at_once(head: Tensor) -> int:
    """How many rows' logits are held together, for a head (V, D): a power of two."""
    return max(FEWEST_ROWS, 1 << max(LOGITS_AT_ONCE // len(head), 1).bit_length() - 1)


def cross_entropy_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) over hidden (N, D) through the head (V, D), without ever holding all logits."""
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _ChunkedCrossEntropy.apply(hidden, head, targets)
    chunks = zip(hidden.split(rows_at_once(head)), targets.split(rows_at_once(head)), strict=True)
    losses = [
        F.cross_entropy(_widened(F.linear(rows, head)), wanted, ignore_index=IGNORE, reduction="sum")
        for rows, wanted in chunks
    ]
    return torch.stack(losses).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, chunk by chunk, while the chunk's logits are at hand.

    The loss is a scalar, so its gradients only have to be multiplied by one number later.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grads = []
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for rows, wanted in zip(hidden.split(rows_at_once(head)), targets.split(rows_at_once(head)), strict=True):
            loss, error = _loss_and_error(project(rows, head), wanted)
            total = total + loss
            hidden_grads.append(times(error, head))
            if head_grad is not None:
                head_grad = head_grad + times(error.T, rows)
        ctx.save_for_backward(torch.cat(hidden_grads).to(hidden.dtype), head_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return *(None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors), None


def _loss_and_error(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk of rows, and d loss / d logits in the logits' own precision.

    In the order of a softmax, and nothing between in memory, so that a compiler makes one pass of it over each row. A
    kernel puts the gradient in the logits' place.
    """
    if fused.serves(logits):
        return fused.losses(logits, targets, IGNORE).sum(), logits
    wide, counted = _widened(logits), (targets != IGNORE)[:, None]
    highest = wide.amax(dim=-1, keepdim=True)  # (rows, 1)
    powers = (wide - highest).exp()
    sums = powers.sum(dim=-1, keepdim=True)
    chosen = wide.gather(-1, targets.clamp(min=0)[:, None])
    # softmax - one_hot(target), zero where nothing was asked
    index = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    right = index == targets.to(torch.int32)[:, None]
    error = torch.where(counted, powers * (1 / sums) - right.to(wide.dtype), 0)
    return torch.where(counted, sums.log() + highest - chosen, 0).sum(), error.to(logits.dtype)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def balance_loss(router_logits: tuple[Tensor, ...], real_tokens: Tensor | None, chosen_per_token: int) -> Tensor:
    """Switch's load-balancing loss (arXiv 2101.03961), averaged over layers: 1 when all experts get equal shares.

    Of each layer's router logits (B, T, E): E * sum over e of (share of choices that fell on e) * (mean probability of
    e). Per layer first, then the mean; padding, 0 in real_tokens (B, T), is left out.
    """
    if not router_logits:
        return torch.zeros(())
    losses = []
    for logits in router_logits:
        flat = logits.flatten(0, -2)  # (N, E)
        experts = flat.shape[-1]
        probabilities = flat.to(torch.promote_types(flat.dtype, torch.float32)).softmax(dim=-1)
        chosen = F.one_hot(flat.topk(chosen_per_token, dim=-1).indices, experts).sum(dim=1).to(probabilities.dtype)
        real = probabilities.new_ones(len(flat), 1)
        if real_tokens is not None:
            real = real_tokens.reshape(-1, 1).to(probabilities.dtype)
        tokens = real.sum().clamp(min=1)
        share = (chosen * real).sum(dim=0) / (tokens * chosen_per_token)
        losses.append(experts * (share * (probabilities * real).sum(dim=0) / tokens).sum())
    return torch.stack(losses).mean()
