"""What `trace` shows must be what the fast path computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SMALL
from test_model import ids

from thinker.attention import QUERY_BLOCK
from thinker.config import ThinkerConfig
from thinker.model import ThinkerLM
from thinker.trace import trace

Build = Callable[..., ThinkerLM]


@torch.no_grad()
def test_logits_equal_the_fast_paths(config: ThinkerConfig, build: Build) -> None:
    """Catches a picture of another network: a branch, a scale or a norm that trace forgot."""
    model, tokens = build(config), ids(2, 20)
    torch.testing.assert_close(trace(model, tokens).logits, model(tokens), rtol=0, atol=1e-12)
    embeddings = model.tok_emb(tokens)
    torch.testing.assert_close(trace(model, embeddings=embeddings).logits, model(tokens), rtol=0, atol=1e-12)


def test_logits_equal_those_of_training(build: Build) -> None:
    """Catches the blocked form drifting away from the plain one in the whole model."""
    length = 2 * QUERY_BLOCK + 10
    model, tokens = build(ThinkerConfig(**SMALL | {"ctx_len": length}, use_qk_norm=True)), ids(1, length)
    torch.testing.assert_close(model(tokens).detach(), trace(model, tokens).logits, rtol=0, atol=1e-11)


def test_no_dropout_and_no_graph(config: ThinkerConfig, build: Build) -> None:
    """Catches a trace that differs from call to call while the model is in training mode, or that keeps a graph."""
    model, tokens = build(config), ids(2, 9)
    calm = trace(model, tokens)
    model.train()
    assert torch.equal(trace(model, tokens).logits, calm.logits)
    assert not calm.logits.requires_grad
    assert model.training, "looking must not change the model"


@torch.no_grad()
def test_attention_is_causal_and_sums_to_one(config: ThinkerConfig, build: Build) -> None:
    """Catches scores shown in place of weights, or the key/value heads' number of maps."""
    seen = trace(build(config), ids(2, 9))
    assert len(seen.attention) == config.n_layers
    for weights in seen.attention:
        assert weights.shape == (2, config.n_heads, 9, 9)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, config.n_heads, 9).double(), rtol=0, atol=1e-14)
        assert float(weights.triu(1).abs().max()) == 0
        assert float(weights.tril().min()) >= 0


@torch.no_grad()
def test_routing_is_the_routers(config: ThinkerConfig, build: Build) -> None:
    """Catches routing of another layer, weights before renormalising, experts not ordered best first."""
    model, tokens = build(config), ids(2, 9)
    seen = trace(model, tokens)
    _, router_logits = model.features(tokens, return_router=True)
    assert len(seen.experts) == len(seen.expert_weights) == len(router_logits)
    for logits, experts, weights in zip(router_logits, seen.experts, seen.expert_weights, strict=True):
        order = logits.argsort(dim=-1, descending=True)[..., : config.num_experts_per_tok]
        assert torch.equal(experts, order)
        wanted = logits.gather(-1, order).softmax(dim=-1)
        torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_norms_are_the_streams(config: ThinkerConfig, build: Build) -> None:
    """Catches lengths taken after a norm, or one layer too few."""
    model, tokens = build(config), ids(2, 9)
    lengths = [model.tok_emb(tokens).norm(dim=-1)]
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: lengths.append(out[0].norm(dim=-1)))
    model(tokens)
    seen = trace(model, tokens).norms
    assert seen.shape == (config.n_layers + 1, 2, 9)
    torch.testing.assert_close(seen, torch.stack(lengths), rtol=0, atol=1e-12)


def test_errors_are_the_models(build: Build) -> None:
    """Catches a trace that runs what the model refuses."""
    model = build(ThinkerConfig(**SMALL))
    for wrong in (torch.tensor([[61]]), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 49, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"vocabulary of 61|empty|ctx_len 48"):
            trace(model, wrong)
    with pytest.raises(ValueError, match="exactly one"):
        trace(model)
