"""What training minimises, against plain autograd and against sums by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from test_model import ids, padded
from torch import Tensor

from thinker import loss
from thinker.config import ThinkerConfig
from thinker.loss import IGNORE, NextTokenLoss, balance_loss, cross_entropy_sum
from thinker.model import ThinkerLM

Build = Callable[..., ThinkerLM]


def targets_with_gaps(rows: int, length: int, seed: int = 1) -> Tensor:
    """Ids, about a third of them replaced by "nothing is asked here"."""
    targets = ids(rows, length, seed=seed)
    gaps = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    return torch.where(gaps, IGNORE, targets)


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_minus_log_p_of_the_right_token(config: ThinkerConfig, build: Build) -> None:
    """Catches logits compared with the wrong place (unflattened, shifted once more), and a mean over ignored tokens."""
    model, tokens, targets = build(config), ids(2, 9), targets_with_gaps(2, 9)
    total, count, _ = NextTokenLoss(model)(tokens, targets)
    probabilities = model(tokens).exp() / model(tokens).exp().sum(dim=-1, keepdim=True)
    surprises = [
        -math.log(float(probabilities[b, t, targets[b, t]]))
        for b in range(2)
        for t in range(9)
        if int(targets[b, t]) != IGNORE
    ]
    assert 5 < len(surprises) < 18
    assert int(count) == len(surprises)
    assert float(total) / int(count) == pytest.approx(sum(surprises) / len(surprises), rel=1e-13)


@pytest.mark.parametrize("rows", [1, 7, 8, 30])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_chunks_equal_autograd(monkeypatch: pytest.MonkeyPatch, rows: int, ignored: str) -> None:
    """Catches a chunk left out or counted twice, ignored targets that pull at token 0, a lost upstream factor."""
    monkeypatch.setattr(loss, "rows_at_once", lambda head: 7)
    draws = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, 16, generator=draws, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 16, generator=draws, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,), generator=draws)
    if ignored != "none":
        targets[: rows if ignored == "all" else rows // 2] = IGNORE
    total = cross_entropy_sum(hidden, head, targets)
    wanted = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    torch.testing.assert_close(total, wanted, rtol=1e-13, atol=0)
    for got, want in zip(
        torch.autograd.grad(0.37 * total, (hidden, head)),
        torch.autograd.grad(0.37 * wanted, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(hidden, head, targets), wanted.detach(), rtol=1e-13, atol=0)


def test_chunk_size_and_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches chunks of all logits or of a few rows, a border between two, a derivative that only looks right."""
    assert loss.rows_at_once(torch.empty(65, 1)) == 32_768
    assert loss.rows_at_once(torch.empty(5000, 1)) == 512
    assert loss.rows_at_once(torch.empty(loss.LOGITS_AT_ONCE + 1, 1)) == 512
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 6 * 64)
    monkeypatch.setattr(loss, "FEWEST_ROWS", 1)
    draws = torch.Generator().manual_seed(3)
    hidden = torch.randn(64 + 5, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    head = torch.randn(6, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(6, (len(hidden),), generator=draws)
    targets[::3] = IGNORE
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets), (hidden, head), fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    """Catches gradients of gradients that are silently incomplete, since the first were computed beforehand."""
    hidden = torch.randn(3, 4, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.randn(6, 4), torch.tensor([1, 2, 3]))
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_large_logits_stay_finite() -> None:
    """Catches an exponential without the maximum taken out."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    total = cross_entropy_sum(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    total.backward()
    assert total.item() == 2000
    assert torch.equal(hidden.grad, torch.tensor([[0.0], [-2.0]]))


def test_gradients_of_the_whole_model_equal_autograd(config: ThinkerConfig, build: Build) -> None:
    """Catches a head gradient lost where the head is the embedding, or a balance loss that is not in the total."""
    model, tokens, targets = build(config), ids(2, 9), targets_with_gaps(2, 9)
    parts = NextTokenLoss(model)(tokens, targets)
    (parts.total / parts.tokens).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-12)
        assert float(parameter.grad.norm()) > 0, name


def test_accumulation_over_ragged_rows_equals_the_whole_batch(config: ThinkerConfig, build: Build) -> None:
    """Catches the mean of means: sums are added, and divided once by the tokens of all micro-batches."""
    module = NextTokenLoss(build(config))
    rows = [ids(1, length, seed=length)[0] for length in (12, 3, 7, 1)]
    tokens, mask = padded(rows)
    targets = torch.where(mask.bool(), ids(4, 12, seed=99), IGNORE)

    whole = module(tokens, targets, attention_mask=mask)
    assert int(whole.tokens) == 23
    (whole.total / whole.tokens).backward()
    wanted = {name: p.grad.clone() for name, p in module.named_parameters()}

    module.zero_grad()
    total = 0.0
    for b, row in enumerate(rows):
        part = module(row[None], targets[b : b + 1, -len(row) :])
        (part.total / 23).backward()
        total += part.total.item()
    assert total == pytest.approx(whole.total.item(), rel=1e-13)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-12)


def test_embeddings_train_too(build: Build) -> None:
    """Catches a gradient that stops before embeddings from an encoder."""
    model, tokens, targets = build(ThinkerConfig(**SMALL)), ids(2, 9), targets_with_gaps(2, 9)
    embeddings = model.tok_emb(tokens).detach().requires_grad_()
    parts = NextTokenLoss(model)(None, targets, embeddings=embeddings)
    assert parts.total.item() == NextTokenLoss(model)(tokens, targets).total.item()
    parts.total.backward()
    assert float(embeddings.grad[:, 0].abs().amax(dim=-1).min()) > 0


def test_what_is_frozen_gets_no_gradient_and_changes_no_other(build: Build) -> None:
    """Catches a frozen head whose gradient is computed all the same, or its own way where nothing trains."""
    model, tokens, targets = build(ThinkerConfig(**SMALL)), ids(2, 9), targets_with_gaps(2, 9)
    module = NextTokenLoss(model)
    module(tokens, targets).total.backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.head.requires_grad_(False)
    module(tokens, targets).total.backward()
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, want[name])
    model.requires_grad_(False)
    assert not module(tokens, targets).total.requires_grad


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (ids(2, 8), r"\(2, 8\).*\(2, 9\)"),
        (ids(1, 9), r"\(1, 9\).*\(2, 9\)"),
        (ids(1, 1), r"\(1, 1\).*\(2, 9\)"),
        (torch.full((2, 9), -1), "-1 .*vocabulary of 61.*-100"),
        (torch.full((2, 9), 61), "61 .*vocabulary of 61"),
        (ids(2, 9).int(), r"torch\.int32: give torch\.int64"),
    ],
)
def test_targets_that_cannot_be_meant(build: Build, targets: Tensor, said: str) -> None:
    """Catches targets broadcast over a batch, and -1 as "ignore", which would pull at token 0 in silence."""
    with pytest.raises(ValueError, match=said):
        NextTokenLoss(build(ThinkerConfig(**SMALL)))(ids(2, 9), targets)


# --- balance of a mixture ---------------------------------------------------------------------------------------------


def by_hand(logits: Tensor, chosen_per_token: int) -> float:
    """E * sum over experts of (share of choices) * (mean probability), for tokens (N, E)."""
    experts = logits.shape[-1]
    choices, probabilities = [0] * experts, [0.0] * experts
    for row in logits:
        for e in row.argsort(descending=True)[:chosen_per_token].tolist():
            choices[e] += 1
        for e, p in enumerate(row.softmax(dim=0).tolist()):
            probabilities[e] += p / len(logits)
    return experts * sum(n / sum(choices) * p for n, p in zip(choices, probabilities, strict=True))


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_balance_by_hand_per_layer_then_mean(chosen: int) -> None:
    """Catches layers concatenated first, the factor of experts per token, and padding that counts."""
    draws = torch.Generator().manual_seed(4)
    layers = tuple(torch.randn(2, 6, 5, generator=draws, dtype=torch.float64) * 2 for _ in range(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    everything = sum(by_hand(logits.flatten(0, 1), chosen) for logits in layers) / 3
    assert float(balance_loss(layers, None, chosen)) == pytest.approx(everything, rel=1e-13)
    real = sum(by_hand(logits[mask.bool()], chosen) for logits in layers) / 3
    assert float(balance_loss(layers, mask, chosen)) == pytest.approx(real, rel=1e-13)
    assert abs(everything - real) > 1e-3


def test_balance_of_uniform_and_of_collapsed_routing() -> None:
    """Catches another scale: 1 when all experts are alike, E / k when k of E do everything, in each layer."""
    assert float(balance_loss((torch.zeros(2, 5, 8),), None, 2)) == pytest.approx(1, rel=1e-6)
    first, last = torch.full((1, 5, 8), -50.0), torch.full((1, 5, 8), -50.0)
    first[..., :2], last[..., 6:] = 50.0, 50.0
    assert float(balance_loss((first, last), None, 2)) == pytest.approx(4, rel=1e-6)
    assert float(balance_loss((), None, 2)) == 0


def test_balance_of_a_model_leaves_padding_out(build: Build) -> None:
    """Catches a mask that reaches attention and not the balance loss, and a loss that doesn't reach the router."""
    model = build(ThinkerConfig(**SMALL, use_moe=True, num_experts=5))
    rows = [ids(1, length, seed=length)[0] for length in (8, 3)]
    tokens, mask = padded(rows)
    parts = NextTokenLoss(model)(tokens, torch.full_like(tokens, IGNORE), attention_mask=mask)
    _, router_logits = model.features(tokens, attention_mask=mask, return_router=True)
    wanted = sum(by_hand(logits[mask.bool()].detach(), 2) for logits in router_logits) / 3
    assert parts.balance.item() == pytest.approx(wanted, rel=1e-13)
    assert (parts.total.item(), int(parts.tokens)) == (0, 0)
    parts.balance.backward()
    for block in model.blocks:
        assert float(block.moe.router.weight.grad.norm()) > 0


def test_balance_of_nothing_but_padding() -> None:
    """Catches a NaN that an empty part of a batch, or rank, would spread over the whole step."""
    assert balance_loss((torch.randn(1, 5, 4),), torch.zeros(1, 5), 2) == 0


def test_dense_models_have_none(build: Build) -> None:
    """Catches a balance loss that breaks what has no router."""
    parts = NextTokenLoss(build(ThinkerConfig(**SMALL)))(ids(2, 9), ids(2, 9))
    assert parts.balance.item() == 0
    assert parts.balance.device == parts.total.device
