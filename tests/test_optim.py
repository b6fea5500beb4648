"""Optimisers and schedules against their definitions."""

import math

import numpy as np
import pytest
import torch

from thinker.config import ThinkerConfig
from thinker.model import ThinkerLM
from thinker.train.config import TrainConfig
from thinker.train.optim import (
    POLAR_EXPRESS,
    AdamW,
    Inheritance,
    Muon,
    beta2_in_tokens,
    build_optimizers,
    hidden_matrices,
    optimizer_tensors,
    orthogonalise,
    rate,
    restore_optimizers,
    set_beta2,
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
    # Singular values of random matrices reach down to about 1e-2 of the largest, which the steps lift above 0.5.
    assert values.max() < 1.25
    assert values.median() > 0.8
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    alike = (done * (u @ vh)).sum(dim=(-2, -1)) / min(shape[-2:])
    assert (alike > 0.85).all(), alike


@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32)])
def test_products_of_gram_matrices_are_those_of_the_matrix(shape):
    """Bug: the fast form for float32 loses small singular values, or multiplies its polynomials in a wrong order."""
    torch.manual_seed(4)
    u, values, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    for smallest in (-1.0, -2.0, -3.5):  # of a gradient they often reach down to 1e-3 of the largest
        values = torch.logspace(0, smallest, 32, dtype=torch.float64)
        matrices = (u * values) @ vh * 1e-4
        fast, plain = orthogonalise(matrices, torch.float32), orthogonalise(matrices, torch.float64)
        torch.testing.assert_close(fast.double(), plain, rtol=0, atol=2e-4)


def test_the_polynomials_bring_what_they_are_made_for_to_one():
    """Bug: a digit of the table is wrong, or a step of it is missing."""
    x = torch.logspace(math.log10(0.0045), 0, 2000, dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() < 0.135


def test_one_large_direction_leaves_the_others_theirs():
    """Bug: the bound is the matrix's own norm, and four steps are too few for what is small beside it."""
    torch.manual_seed(5)
    u, _, vh = torch.linalg.svd(torch.randn(1, 64, 64))
    for values in (torch.ones(64), torch.tensor([1.0] + 63 * [0.005])):
        done = torch.linalg.svdvals(orthogonalise((u * values) @ vh, torch.float32))
        assert (done - 1).abs().max() < 0.15, done


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


@pytest.mark.parametrize(("name", "pace"), [("muon", 1e-2), ("adamw", 1e-3)])
def test_all_matrices_decay_alike_and_vectors_never(name, pace):
    """Bug: the embedding learns its text by heart beside decaying layers, or a norm is worn away."""
    model = ThinkerLM(ThinkerConfig(vocab_size=50, d_model=16, n_layers=2, d_ff=32, use_moe=True, layer_scale=0.1))
    settings = {"lr": 1e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "muon_dtype": torch.float32}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # some begin as zero, which no decay changes
        parameter.grad = torch.zeros_like(parameter)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for one in build_optimizers(model, optimizer=name, **settings):
        one.step()
    for key, parameter in model.named_parameters():
        left = 1 - 0.1 * pace if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * left, rtol=1e-6, atol=0, msg=key)


PARTS = np.array([[-1, -1], [-1, -1], [0, 1], [2, 2], [5, 3], [1, 0]])  # 4 is made of one that comes after it


def dense(share):
    """I of `PARTS` by its definition: rows E with E = own + share * (the sum of the parts' rows of E)."""
    direct = torch.zeros(6, 6)
    for token, parts in enumerate(PARTS):
        for part in parts[parts >= 0]:
            direct[token, part] += share
    return torch.linalg.inv(torch.eye(6) - direct)


def test_inheritance_is_the_matrix_it_stands_for():
    """Bug: only direct parts are inherited, a token made twice of one counts it once, or a gradient goes to heirs."""
    torch.manual_seed(6)
    rows, inheritance = torch.randn(6, 3), Inheritance(PARTS, 0.5)
    torch.testing.assert_close(inheritance.spread(rows), dense(0.5) @ rows)
    torch.testing.assert_close(inheritance.gather(rows), dense(0.5).T @ rows)


def test_training_what_tokens_inherit_is_training_what_they_own():
    """Bug: rows move by their own gradients too, decay isn't one of what is owned, or the step differs from AdamW's."""
    torch.manual_seed(7)
    start, targets = torch.randn(6, 3), torch.randn(4, 6, 3)
    own = torch.nn.Parameter(torch.linalg.solve(dense(0.5), start))
    plain = torch.optim.AdamW([own], lr=0.1, weight_decay=0.3)
    matrix, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2, 2))
    group = {"params": [matrix], "inheritance": Inheritance(PARTS, 0.5), "weight_decay": 0.3}
    ours = AdamW([group, {"params": [other], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.999))
    for target in targets:
        (dense(0.5) @ own - target).square().sum().backward()
        ((matrix - target).square().sum() + other.sum()).backward()
        for optimizer in (plain, ours):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(matrix.detach(), (dense(0.5) @ own).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.detach(), torch.full((2, 2), 0.6))


def test_a_step_whose_gradients_overflowed_moves_nothing():
    """Bug: with float16 the fused kernel skips such a step, and rows move by the decay that it left out."""
    matrix = torch.nn.Parameter(torch.ones(6, 3))
    group = {"params": [matrix], "inheritance": Inheritance(PARTS, 0.5), "weight_decay": 0.3}
    optimizer = AdamW([group], lr=0.1, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu")
    for gradient, moves in ((math.inf, False), (1.0, True)):
        before = matrix.detach().clone()
        scaler.scale((matrix * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(matrix.detach(), before) != moves


def test_inheritance_is_of_the_embedding_and_the_head():
    """Bug: a router's rows count as tokens, a tied matrix moves twice, or one of the two is left out."""
    settings = {"lr": 1e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "muon_dtype": torch.float32}
    for options, count in (({"use_moe": True}, 2), ({"tie_embeddings": True}, 1)):
        model = ThinkerLM(ThinkerConfig(vocab_size=6, d_model=16, n_layers=1, d_ff=32, **options))
        built = build_optimizers(model, optimizer="muon", inheritance=Inheritance(PARTS, 0.5), **settings)
        (group,) = [group for one in built for group in one.param_groups if "inheritance" in group]
        assert {id(p) for p in group["params"]} == {id(model.tok_emb.weight), id(model.head.weight)}
        assert len(group["params"]) == count
        owned = [id(p) for one in built for group in one.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())


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
    every = ("linear", "cosine", "wsd", "constant")
    assert all(math.isfinite(rate(p / 100, schedule=s, warmup=0.02)) for p in range(101) for s in every)


def test_warmup_stable_decay():
    """Bug: the plateau falls, the decay begins at the wrong place or jumps, or warm-up and decay overlap."""

    def wsd(progress, warmup=0.1, cooldown=0.2):
        return rate(progress, schedule="wsd", warmup=warmup, cooldown=cooldown)

    assert wsd(0.05) == pytest.approx(0.5)
    assert [wsd(p) for p in (0.1, 0.3, 0.5, 0.79, 0.8)] == [1, 1, 1, 1, 1]
    assert wsd(0.85) == pytest.approx(1 - math.sqrt(0.25))
    assert wsd(0.95) == pytest.approx(1 - math.sqrt(0.75))
    assert wsd(1.0) == pytest.approx(0, abs=1e-9)
    assert wsd(0.3, warmup=0.5, cooldown=0.5) == pytest.approx(0.6)
    assert wsd(0.5, warmup=0.5, cooldown=0.5) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_a_schedule_that_is_overrun_stays_at_its_end(schedule):
    """Bug: the last step of a run by the clock begins past its end, and a negative rate climbs the loss."""
    end, beyond = (rate(p, schedule=schedule, warmup=0.02) for p in (1.0, 1.3))
    assert beyond == pytest.approx(end)
    assert beyond >= -1e-12


def test_beta2_halves_a_gradients_weight_in_so_many_tokens():
    """Bug: a half-life in steps instead of tokens, or in e-foldings."""
    assert beta2_in_tokens(4096, 4096.0) == 0.5
    assert beta2_in_tokens(100, 1000.0) ** 10 == pytest.approx(0.5)
    # What is commonly set for 8 x 512 and for 12 x 64 tokens a step.
    assert TrainConfig().adam_beta2(8 * 512) == pytest.approx(0.95, abs=1e-3)
    assert TrainConfig().adam_beta2(12 * 64) == pytest.approx(0.99, abs=1e-3)
    assert TrainConfig(beta2=0.9).adam_beta2(1) == 0.9


def test_set_beta2_leaves_muon_and_beta1_alone():
    """Bug: Muon's groups get a key that it doesn't know, or β1 is lost."""
    model = ThinkerLM(ThinkerConfig(vocab_size=50, d_model=16, n_layers=1, d_ff=32))
    built = build_optimizers(
        model, optimizer="muon", lr=1e-3, muon_lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95), muon_dtype=torch.float32
    )
    set_beta2(built, 0.99)
    assert [group.get("betas") for one in built for group in one.param_groups] == [None] * 2 + [(0.8, 0.99)] * 2


def test_set_rate_is_a_share_of_each_groups_peak():
    """Bug: one learning rate for both optimisers, or the share multiplies what it set before."""
    model = ThinkerLM(ThinkerConfig(vocab_size=50, d_model=16, n_layers=1, d_ff=32))
    built = build_optimizers(
        model, optimizer="muon", lr=1e-3, muon_lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), muon_dtype=torch.float32
    )
    set_rate(built, 0.5)
    set_rate(built, 0.5)
    assert {group["lr"] for one in built for group in one.param_groups} == {5e-4, 5e-3}
