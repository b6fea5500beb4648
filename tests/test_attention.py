"""The fast forms of attention against the plain one, and the plain one against a loop by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thinker import attention
from thinker.attention import QUERY_BLOCK, attend, blocked_causal, masked, plain
from thinker.config import ThinkerConfig
from thinker.model import Attention, ThinkerLM

HEADS = [(4, 4), (6, 2), (4, 1)]  # query heads, key/value heads
LENGTHS = [1, 2, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 45]


def draw(heads: tuple[int, int], queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v of two rows, eight wide, of a size that makes the softmax peaked."""
    draws = torch.Generator().manual_seed(queries * 1000 + keys)
    q = torch.randn(2, heads[0], queries, 8, generator=draws, dtype=torch.float64) * 2
    k, v = (torch.randn(2, heads[1], keys, 8, generator=draws, dtype=torch.float64) * 2 for _ in range(2))
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v))


def outcome(form: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output of a form and its gradients by q, k, v, for one fixed upstream gradient."""
    y = form(*tensors)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, tensors, upstream)


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
def test_plain_equals_a_loop_by_hand(heads: tuple[int, int]) -> None:
    """Catches a wrong scale, a softmax over the wrong dimension, a query that sees its future, heads paired wrongly."""
    q, k, v = draw(heads, 5, 5)
    y, weights = plain(q, k, v, causal=True)
    for b in range(2):
        for head in range(heads[0]):
            group = head // (heads[0] // heads[1])
            for t in range(5):
                scores = [float(q[b, head, t] @ k[b, group, s]) / math.sqrt(8) for s in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                shares = [math.exp(score) / total for score in scores]
                wanted = sum(share * v[b, group, s] for s, share in enumerate(shares))
                torch.testing.assert_close(y[b, head, t], wanted, rtol=0, atol=1e-13)
                padded = torch.tensor(shares + [0.0] * (4 - t), dtype=torch.float64)
                torch.testing.assert_close(weights[b, head, t], padded, rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_form_equals_the_plain_one_gradients_too(heads: tuple[int, int], length: int) -> None:
    """Catches a block that sees one key too many or too few, key/value heads summed wrongly backwards, a lost scale."""
    tensors = draw(heads, length, length)
    wanted = outcome(lambda q, k, v: plain(q, k, v, causal=True)[0], tensors)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for form in (blocked_causal, fused, lambda q, k, v: attend(q, k, v, causal=True)):
        for got, want in zip(outcome(form, tensors), wanted, strict=True):
            # Some hundred float64 terms of the order of 10.
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_in_lower_precision(dtype: torch.dtype) -> None:
    """Catches a form that only holds in float64: a result of another type, a mask whose infinity is no number there."""
    tensors = draw((4, 2), 300, 300, dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)
    wanted = outcome(lambda q, k, v: plain(q, k, v, causal=True)[0], exact)
    past = torch.ones(300, 300, dtype=torch.bool).tril()
    for form in (blocked_causal, lambda q, k, v: masked(q, k, v, past)):
        got = outcome(form, tensors)
        assert got[0].dtype == dtype
        # Scores reach some 30, so their rounding alone, by half of eps, changes a weight by as much as 15 eps.
        tolerance = 15 * torch.finfo(dtype).eps
        for one, other in zip(got, wanted, strict=True):
            assert float((one.double() - other).norm() / other.norm()) < tolerance


def test_blocks_serve_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the fast path never being taken, so that its proofs prove nothing, or taken where it must not be."""
    lengths = []

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append(q.shape[2])
        return blocked_causal(q, k, v)

    monkeypatch.setattr(attention, "blocked_causal", recorded)
    for length in (QUERY_BLOCK, QUERY_BLOCK + 1):
        tensors = draw((2, 2), length, length)
        attend(*tensors, causal=True)
        attend(*tensors, causal=False)
        with torch.no_grad():
            attend(*(x.detach() for x in tensors), causal=True)
    assert lengths == [QUERY_BLOCK + 1]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_mask", [True, False])
def test_short_rows_as_plain_products(heads: tuple[int, int], with_mask: bool) -> None:
    """Catches heads paired with other groups, a mask that reaches other rows, a gradient through what is hidden."""
    tensors = draw(heads, 9, 9)
    visible = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    visible |= torch.eye(9, dtype=torch.bool)
    mask = visible if with_mask else None
    wanted = outcome(lambda q, k, v: plain(q, k, v, mask)[0], tensors)
    for got, want in zip(outcome(lambda q, k, v: masked(q, k, v, mask), tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_short_rows_are_products_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the fast path never being taken, or taken where the fused kernel is faster."""
    taken = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        taken.append((q.dtype, q.shape[2]))
        return masked(q, k, v, visible)

    monkeypatch.setattr(attention, "masked", recorded)
    for dtype in (torch.float32, torch.bfloat16):
        for length in (QUERY_BLOCK, QUERY_BLOCK + 1):
            tensors = draw((2, 2), length, length, dtype)
            attend(*tensors)
            attend(*tensors, torch.ones(length, length, dtype=torch.bool).tril())
            attend(*tensors, causal=True)
            attend(*(x.detach() for x in tensors))
    assert taken == [(torch.bfloat16, QUERY_BLOCK)] * 2


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (3, 7), (7, 7)])
def test_a_mask_means_the_same_everywhere(heads: tuple[int, int], queries: int, keys: int) -> None:
    """Catches a mask taken the wrong way round, or one that is not spread over heads and groups alike."""
    q, k, v = draw(heads, queries, keys)
    visible = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.5
    visible[..., 0] = True
    got = attend(q, k, v, visible)
    want, weights = plain(q, k, v, visible)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert torch.equal(weights == 0, ~visible.expand_as(weights))


@torch.no_grad()
def test_as_many_groups_as_heads_equal_full_attention(build: Callable[..., ThinkerLM]) -> None:
    """Catches q, k, v lying in another order in the fused matrix than in the separate ones."""
    config = ThinkerConfig(vocab_size=61, n_layers=2, d_model=32, n_heads=4, d_ff=48, ctx_len=48, use_qk_norm=True)
    full = build(config)
    grouped = build(config.changed(use_gqa=True, kv_groups=4), seed=1)
    tensors = dict(full.state_dict())
    for layer in range(2):
        fused = tensors.pop(f"blocks.{layer}.attn.qkv.weight")
        for part, rows in zip("qkv", fused.chunk(3), strict=True):
            tensors[f"blocks.{layer}.attn.{part}.weight"] = rows
    grouped.load_state_dict(tensors)
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_equal_full_attention_with_repeated_heads(build: Callable[..., ThinkerLM], groups: int) -> None:
    """Catches groups interleaved (head h using group h mod G) where neighbours share: head h uses group h // (H/G)."""
    config = ThinkerConfig(vocab_size=61, n_layers=2, d_model=32, n_heads=4, d_ff=48, ctx_len=48)
    grouped = build(config.changed(use_gqa=True, kv_groups=groups))
    full = build(config, seed=1)
    tensors = dict(grouped.state_dict())
    for layer in range(2):
        q, k, v = (tensors.pop(f"blocks.{layer}.attn.{part}.weight") for part in "qkv")
        k, v = (part.view(groups, 8, 32).repeat_interleave(4 // groups, dim=0).reshape(32, 32) for part in (k, v))
        tensors[f"blocks.{layer}.attn.qkv.weight"] = torch.cat((q, k, v))
    full.load_state_dict(tensors)
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("length", [9, QUERY_BLOCK + 9])
def test_encoders_look_both_ways(length: int) -> None:
    """Catches causal=False that is read and never passed on."""
    config = ThinkerConfig(d_model=32, n_heads=4, n_layers=1, ctx_len=2 * QUERY_BLOCK)
    draws = torch.Generator().manual_seed(6)
    x = torch.randn(1, length, 32, generator=draws, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] += 1
    still = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for causal in (True, False):
        module = Attention(config, 0, causal=causal).double()
        difference = (module(x, still) - module(changed, still)).abs().amax(dim=-1)[0, :-1]
        if causal:
            assert torch.equal(difference, torch.zeros_like(difference))
        else:
            assert float(difference.min()) > 1e-6


@torch.no_grad()
def test_scores_are_scaled_by_the_heads_own_width(build: Callable[..., ThinkerLM]) -> None:
    """Catches 1/sqrt(d_model / n_heads) where head_dim is another, and 1/sqrt(d_model)."""
    config = ThinkerConfig(d_model=32, n_heads=4, head_dim=20, n_layers=1, ctx_len=8)
    module = build(config).blocks[0].attn
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    still = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    q, k, v = (part.view(3, 4, 20) for part in module.qkv(x)[0].chunk(3, dim=-1))
    heads = [
        torch.softmax(torch.stack([q[2, head] @ k[s, head] for s in range(3)]) / 20**0.5, dim=0) @ v[:, head]
        for head in range(4)
    ]
    wanted = module.out_proj.weight @ torch.cat(heads)
    torch.testing.assert_close(module(x, still)[0, 2], wanted, rtol=0, atol=1e-12)
