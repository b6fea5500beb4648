"""Optimisers and schedules against their definitions."""

import math

import pytest
import torch

from thinker.config import ThinkerConfig
from thinker.model import ThinkerLM
from thinker.train.optim import (
    Muon,
    build_optimizers,
    hidden_matrices,
    optimizer_tensors,
    orthogonalise,
    rate,
    restore_optimizers,
    set_rate,
)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_brings_singular_values_to_one_and_keeps_the_directions(shape, dtype):
    """Bug: wrong coefficients, a product transposed for tall matrices, or a norm over the whole batch."""
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    done = orthogonalise(matrices, dtype).float()
    assert done.shape == shape
    values = torch.linalg.svdvals(done)
    # Singular values of random matrices reach down to about 1e-2 of the largest; five steps lift those above 0.5.
    assert values.max() < 1.25
    assert values.median() > 0.8
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    alike = (done * (u @ vh)).sum(dim=(-2, -1)) / min(shape[-2:])
    assert (alike > 0.85).all(), alike


def test_a_batch_is_orthogonalised_as_its_matrices_alone():
    """Bug: matrices of one shape mix when they are stacked."""
    torch.manual_seed(2)
    matrices = torch.randn(4, 16, 32)
    together = orthogonalise(matrices, torch.float32)
    alone = torch.cat([orthogonalise(one[None], torch.float32) for one in matrices])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_fused_qkv_is_three_matrices_and_stacked_experts_are_many():
    """Bug: the three projections are orthogonalised as one tall matrix, and the largest swallows the rest."""
    torch.manual_seed(3)
    fused = torch.nn.Parameter(torch.randn(24, 8))
    apart = [torch.nn.Parameter(part.clone()) for part in fused.detach().split(8)]
    gradient = torch.randn(24, 8) * torch.tensor([1.0] * 8 + [100.0] * 8 + [0.01] * 8)[:, None]
    fused.grad = gradient.clone()
    for parameter, part in zip(apart, gradient.split(8), strict=True):
        parameter.grad = part.clone()
    Muon([{"params": [fused], "parts": 3}], lr=0.1).step()
    Muon([{"params": apart}], lr=0.1).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in apart]), rtol=1e-5, atol=1e-6)

    experts = torch.nn.Parameter(torch.zeros(3, 8, 8))
    experts.grad = torch.randn(3, 8, 8)
    Muon([{"params": [experts]}], lr=1.0).step()
    assert (torch.linalg.svdvals(-experts.detach()) > 0.3).all()


def test_muon_moves_against_the_gradient_with_momentum_and_decay():
    """Bug: the update has the wrong sign, momentum is dropped, or decay is not decoupled from the gradient."""
    parameter = torch.nn.Parameter(torch.eye(4))
    optimizer = Muon([{"params": [parameter]}], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.eye(4)
    optimizer.step()
    update = orthogonalise(torch.eye(4)[None], torch.float32)[0]
    torch.testing.assert_close(parameter.detach(), torch.eye(4) * (1 - 0.05) - 0.1 * update, rtol=1e-5, atol=1e-6)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    assert (parameter.detach() - before * 0.95).diagonal().max() < -0.05, "momentum goes on without a gradient"


def test_every_parameter_has_one_optimiser():
    """Bug: a parameter is trained twice or never; the router or the embedding goes to Muon."""
    for options in ({}, {"use_moe": True}, {"use_gqa": True, "use_qk_norm": True}, {"tie_embeddings": True}):
        model = ThinkerLM(ThinkerConfig(vocab_size=50, d_model=16, n_layers=2, d_ff=32, layer_scale=0.1, **options))
        settings = {"lr": 1e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "muon_dtype": torch.float32}
        for name in ("muon", "adamw"):
            built = build_optimizers(model, optimizer=name, **settings)
            owned = [id(p) for one in built for group in one.param_groups for p in group["params"]]
            assert sorted(owned) == sorted(id(p) for p in model.parameters())
        matrices = hidden_matrices(model)
        assert not any("router" in name or "emb" in name or "head" in name or "norm" in name for name in matrices)
        assert any("experts" in name for name in matrices) == bool(options.get("use_moe"))


def test_the_state_round_trips_by_name():
    """Bug: a resumed run gets another parameter's momentum, or none."""
    torch.manual_seed(4)
    config = ThinkerConfig(vocab_size=50, d_model=16, n_layers=2, d_ff=32)
    settings = {"lr": 1e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "muon_dtype": torch.float32}
    first, second = ThinkerLM(config), ThinkerLM(config)
    second.load_state_dict(first.state_dict())
    ours = build_optimizers(first, optimizer="muon", **settings)
    for parameter in first.parameters():
        parameter.grad = torch.randn_like(parameter)
    for one in ours:
        one.step()
    theirs = build_optimizers(second, optimizer="muon", **settings)
    second.load_state_dict(first.state_dict())
    restore_optimizers(second, theirs, {name: t.clone() for name, t in optimizer_tensors(first, ours).items()})
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    for one in (*ours, *theirs):
        one.step()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="this model lacks"):
        restore_optimizers(second, theirs, {"nobody/momentum": torch.zeros(1)})


def test_schedules():
    """Bug: warm-up divides by zero, cosine starts anew after the end, linear doesn't reach zero."""
    assert rate(0.0, schedule="linear", warmup=0.1) == 0
    assert rate(0.05, schedule="linear", warmup=0.1) == pytest.approx(0.5)
    assert rate(0.1, schedule="linear", warmup=0.1) == 1
    assert rate(0.55, schedule="linear", warmup=0.1) == pytest.approx(0.5)
    assert rate(1.0, schedule="linear", warmup=0.1) == pytest.approx(0)
    assert rate(0.0, schedule="linear", warmup=0.0) == 1
    assert rate(0.5, schedule="cosine", warmup=0.0) == pytest.approx(0.55)
    assert rate(1.0, schedule="cosine", warmup=0.0) == pytest.approx(0.1)
    assert rate(0.9, schedule="constant", warmup=0.1) == 1
    assert all(math.isfinite(rate(p / 100, schedule=s, warmup=0.02)) for p in range(101) for s in ("linear", "cosine"))


def test_set_rate_is_a_share_of_each_groups_peak():
    """Bug: one learning rate for both optimisers, or the share multiplies what it set before."""
    model = ThinkerLM(ThinkerConfig(vocab_size=50, d_model=16, n_layers=1, d_ff=32))
    built = build_optimizers(
        model, optimizer="muon", lr=1e-3, muon_lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), muon_dtype=torch.float32
    )
    set_rate(built, 0.5)
    set_rate(built, 0.5)
    assert {group["lr"] for one in built for group in one.param_groups} == {5e-4, 5e-3}
