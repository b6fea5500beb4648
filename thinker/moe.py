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
from torch.autograd.function import once_differentiable

from .activations import Activate, gated
from .config import ThinkerConfig
from .fused import weights

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

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
        product, spacing, dtype = product_for(self.experts, flat)
        places, sources, counts = arrange(chosen, self.router.out_features, spacing)
        pairs = flat.to(dtype).repeat_interleave(self.chosen_per_token, dim=0)  # (N K, D), a token with each expert
        rows = _Moved.apply(pairs, sources, places)
        answers = apply_experts(self.experts, rows, counts, self.activate, product)
        answers = _Moved.apply(answers, places, sources).view(*chosen.shape, -1)  # (N, K, D)
        mixed = (answers * weights.to(answers.dtype).unsqueeze(-1)).sum(dim=1)  # (N, D)
        return mixed.view_as(x), router_logits


def choose(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, (N, k), and their weights, which sum to 1; softmax in at least float32."""
    best, chosen = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)).topk(k, dim=-1)
    return best.softmax(dim=-1), chosen


def product_for(experts: Experts, rows: Tensor) -> tuple[Product, int, torch.dtype]:
    """What multiplies rows, of what the sizes of their groups are to be multiples, and in which type.

    For products in narrow types on a processor oneDNN makes a program for every number of rows, which takes longer than
    to run it where that is fast (with AMX 2.6 times as long for a whole step). Few numbers come again and again.
    """
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    # The grouped product has no float64, and wants every row to fill whole 16 bytes.
    widths = (experts.gate_proj.shape[-1], experts.down_proj.shape[-1])
    if dtype == torch.float64 or any(width * dtype.itemsize % 16 for width in widths):
        return looped_product, 1, dtype
    return grouped_product, SPACING if kind == "cpu" and dtype.itemsize < 4 else 1, dtype


def arrange(chosen: Tensor, experts: int, spacing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N K pairs of a token with one of its experts, `chosen` (N, K), by expert, and by token within one.

    The place of each pair, (N K,); the pair at each place, or N K at none, as many as there can be; and how many places
    each expert has, (E,), multiples of `spacing`.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = F.one_hot(flat, experts).sum(dim=0)
    wide = (counts + spacing - 1) // spacing * spacing
    gaps = (wide - counts).cumsum(dim=0) - (wide - counts)  # before each expert
    sorted_places = torch.arange(len(flat), device=flat.device) + gaps[flat[order]]
    places = torch.empty_like(order).scatter_(0, order, sorted_places)
    # What lies behind the last expert's rows belongs to none, and whatever the products leave there is never read.
    room = len(flat) + experts * (spacing - 1)
    return places, order.new_full((room,), len(flat)).scatter_(0, sorted_places, order), wide


class _Moved(torch.autograd.Function):
    """Rows of x (M, D) in another order, `at` (R,), zeros where that is M; `back` (M,) is where each has gone.

    With both known, gradients are fetched as well, where autograd would add them up one after another.
    """

    @staticmethod
    def forward(ctx, x: Tensor, at: Tensor, back: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        return _fetched(x, at)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (back,) = ctx.saved_tensors
        return _fetched(upstream, back), None, None


def _fetched(x: Tensor, at: Tensor) -> Tensor:
    if len(at) <= len(x):  # no gaps
        return x[at]
    return torch.where((at < len(x))[:, None], x[at.clamp(max=len(x) - 1)], 0)


def apply_experts(experts: Experts, rows: Tensor, counts: Tensor, activate: Activate, product: Product) -> Tensor:
    """Each expert's SwiGLU on its share of rows (R, D), which are sorted by expert: (R, D)."""
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    return product(gated(activate, product(rows, gate, counts), product(rows, up, counts)), down, counts)


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows @ weight[e].T for each expert's rows in one call: no loop, no synchronisation."""
    ends = counts.cumsum(dim=0)
    if weights.serves(rows, weight):
        return _GroupedProduct.apply(rows, weight, ends)
    return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends.to(torch.int32))


class _GroupedProduct(torch.autograd.Function):
    """The same for groups of whole blocks of rows, with the weights' gradient of `fused/`."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        matrices = weight.to(rows.dtype)
        ctx.save_for_backward(rows, matrices, ends)
        ctx.dtype = weight.dtype
        return F.grouped_mm(rows, matrices.transpose(-2, -1), offs=ends.to(torch.int32))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        rows, matrices, ends = ctx.saved_tensors
        rows_grad = F.grouped_mm(upstream, matrices, offs=ends.to(torch.int32))
        return rows_grad, weights.gradient(upstream, rows, ends).to(ctx.dtype), None


def looped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same in so many words, for what the grouped product can't take."""
    shares = rows.split(counts.tolist())
    return torch.cat([share @ matrix.T for share, matrix in zip(shares, weight.to(rows.dtype), strict=True)])
