"""The mixture of experts: a router and stacked SwiGLU experts, of which only the chosen ones compute.

The load-balancing loss is in `loss.py`. Expert weights are stacked, (E, out, in), so that one grouped product serves
all experts.
"""

# N tokens, K experts per token, E experts, D d_model, F d_ff

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ThinkerConfig

Activate = Callable[[Tensor], Tensor]

SPACING = 64  # rows


class Experts(nn.Module):
    """E SwiGLU experts as three stacked matrices."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        E, D, d_ff = config.num_experts, config.d_model, config.d_ff
        self.gate_proj = nn.Parameter(torch.empty(E, d_ff, D))
        self.up_proj = nn.Parameter(torch.empty(E, d_ff, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, d_ff))


class MoE(nn.Module):
    """Top-k routing over SwiGLU experts (Mixtral, arXiv 2401.04088).

    The weights are a softmax over the chosen experts' logits alone, which equals renormalising their probabilities.
    """

    def __init__(self, config: ThinkerConfig, activate: Activate) -> None:
        super().__init__()
        self.chosen_per_token = config.num_experts_per_tok
        self.activate = activate
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to the experts' answer (B, T, D) and the router's logits (B, T, E)."""
        router_logits = self.router(x)  # (B, T, E)
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        weights, chosen = choose(router_logits.reshape(len(flat), -1), self.chosen_per_token)  # (N, K), (N, K)

        # Sort the N * K (token, expert) pairs by expert: pair p belongs to token p // K, and `order` puts pairs of the
        # same expert side by side, in the order of their tokens.
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), self.router.out_features).sum(dim=0)  # (E,)
        rows = flat[order // self.chosen_per_token]  # (N * K, D)
        answers = apply_experts(self.experts, rows, counts, self.activate)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        answers = answers[back].view(*chosen.shape, -1)  # (N, K, D)
        mixed = (answers * weights.to(answers.dtype).unsqueeze(-1)).sum(dim=1)  # (N, D)
        return mixed.view_as(x), router_logits


def choose(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, (N, k), and their weights, which sum to 1; softmax in at least float32."""
    best, chosen = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)).topk(k, dim=-1)
    return best.softmax(dim=-1), chosen


def apply_experts(experts: Experts, rows: Tensor, counts: Tensor, activate: Activate) -> Tensor:
    """Each expert's SwiGLU on its share of rows (N * K, D), which are sorted by expert: (N * K, D)."""
    dtype = torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else rows.dtype
    weights = (experts.gate_proj.to(dtype), experts.up_proj.to(dtype), experts.down_proj.to(dtype))
    # The grouped product has no float64, and wants every row to fill whole 16 bytes.
    fits = dtype != torch.float64 and all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)
    product = grouped_product if fits else looped_product
    gate, up, down = weights
    rows = rows.to(dtype)
    spacing_pays = fits and rows.device.type == "cpu" and dtype != torch.float32
    rows, counts, places = spaced(rows, counts) if spacing_pays else (rows, counts, None)
    answers = product(activate(product(rows, gate, counts)) * product(rows, up, counts), down, counts)
    return answers if places is None else answers[places]


def spaced(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, D) with zeros behind each expert's, so that it has a multiple of `SPACING`: with what is left at the end
    (R + E * SPACING, D), new counts (E,), and where each row is now (R,).

    For products in narrow types on a processor oneDNN makes a program for every number of rows, which takes longer than
    to run it where that is fast (with AMX 2.6 times as long for a whole step). Few numbers come again and again.
    """
    wide = (counts + SPACING - 1) // SPACING * SPACING
    moved = (wide - counts).cumsum(dim=0) - (wide - counts)  # how far each expert's rows move
    places = torch.arange(len(rows), device=rows.device) + moved.repeat_interleave(counts, output_size=len(rows))
    room = rows.new_zeros(len(rows) + len(counts) * SPACING, rows.shape[1])
    return room.index_copy(0, places, rows), wide, places


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows @ weight[e].T for each expert's rows in one call: no loop, no synchronisation."""
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=counts.cumsum(dim=0).to(torch.int32))


def looped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same in so many words, for what the grouped product can't take."""
    shares = rows.split(counts.tolist())
    return torch.cat([share @ matrix.T for share, matrix in zip(shares, weight, strict=True)])
