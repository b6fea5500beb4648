"""The mixture of experts against a loop over tokens, and its two products against each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, randomise
from torch import Tensor

from thinker import moe
from thinker.activations import ACTIVATIONS
from thinker.config import ThinkerConfig
from thinker.model import MLP
from thinker.moe import SPACING, MoE, arrange, choose, grouped_product, looped_product


def mixture(experts: int = 8, chosen: int = 2, activation: str = "silu", **fields: int) -> MoE:
    sizes = SMALL | fields
    config = ThinkerConfig(**sizes, use_moe=True, num_experts=experts, num_experts_per_tok=chosen)
    return randomise(MoE(config, ACTIVATIONS[activation]).double())


def stream(rows: int = 2, length: int = 9, width: int = 32) -> Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def loop_over_tokens(module: MoE, x: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """Each token: probabilities of all experts, the best k, renormalised, their answers weighted and added."""
    y = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        probabilities = (module.router.weight @ x[b, t]).softmax(dim=0)
        best = probabilities.argsort(descending=True)[: module.chosen_per_token].tolist()
        for e in best:
            gate, up = module.experts.gate_proj[e] @ x[b, t], module.experts.up_proj[e] @ x[b, t]
            answer = module.experts.down_proj[e] @ (activate(gate) * up)
            y[b, t] += probabilities[e] / probabilities[best].sum() * answer
    return y


@torch.no_grad()
@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (8, 1), (5, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_equals_a_loop_over_tokens(experts: int, chosen: int, activation: str) -> None:
    """Catches answers added without weights, weights not renormalised, answers given back to other tokens."""
    module = mixture(experts, chosen, activation)
    x = stream()
    y, router_logits = module(x)
    torch.testing.assert_close(y, loop_over_tokens(module, x, ACTIVATIONS[activation]), rtol=0, atol=1e-12)
    torch.testing.assert_close(router_logits, x @ module.router.weight.T, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_equals_float64(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    """Catches widths that the grouped product refuses: rows of 30 numbers don't fill whole 16 bytes."""
    module = mixture(d_model=width, n_heads=1, d_ff=width + 16)
    x = stream(width=width).to(dtype)
    wanted = loop_over_tokens(module.to(dtype).double(), x.double(), F.silu)
    calls = []

    def recorded(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        calls.append(rows.dtype)
        return grouped_product(rows, weight, counts)

    monkeypatch.setattr(moe, "grouped_product", recorded)
    y = module.to(dtype)(x)[0]
    assert calls == ([dtype] * 3 if width == 32 else [])
    close = (y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1) < 8 * torch.finfo(dtype).eps
    # bfloat16 may prefer another expert where two are nearly equal.
    assert float(close.double().mean()) >= (1.0 if dtype == torch.float32 else 0.9)


@torch.no_grad()
def test_equal_experts_equal_one_mlp() -> None:
    """Catches weights that don't sum to 1."""
    mlp = randomise(MLP(ThinkerConfig(**SMALL)).double())
    module = mixture()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(module.experts, name).copy_(getattr(mlp, name).weight.expand(8, -1, -1))
    torch.testing.assert_close(module(stream())[0], mlp(stream()), rtol=0, atol=1e-12)


def test_softmax_of_the_chosen_is_the_renormalised_one() -> None:
    """Catches a softmax over all experts left as it is (Qwen's default), and one in bfloat16."""
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    weights, chosen = choose(logits, 3)
    best = logits.softmax(dim=-1).topk(3, dim=-1)
    assert torch.equal(chosen, best.indices)
    wanted = best.values / best.values.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights, wanted, rtol=1e-13, atol=0)
    assert choose(logits.bfloat16(), 3)[0].dtype == torch.float32


def gradients(product: Callable[..., Tensor], rows: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(rows, weight, counts)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (rows, weight), upstream)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [10, 0, 0, 0], [0, 0, 0, 10], [1, 1, 1, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_grouped_product_equals_the_loop_gradients_too(counts: list[int], dtype: torch.dtype, whole: bool) -> None:
    """Catches rows given to a neighbouring expert, and an idle expert whose gradient is left uninitialised."""
    draws = torch.Generator().manual_seed(6)
    if whole:  # in blocks of 32, as a kernel of `fused/` wants them
        counts, N, M, K = [32 * count for count in counts], 320, 32, 64
    else:
        N, M, K = 10, 24, 16
    rows, weight = torch.randn(N, K, generator=draws).to(dtype), torch.randn(4, M, K, generator=draws).to(dtype)
    got = gradients(grouped_product, rows, weight, torch.tensor(counts))
    exact = gradients(looped_product, rows.double(), weight.double(), torch.tensor(counts))
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == dtype
        # As many terms, of products below 10 that are rounded by half an eps, and partial sums rounded again.
        terms = max(K, M, *counts)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=terms * 10 * torch.finfo(dtype).eps / 2)
    for weight_gradient, count in zip(got[2], counts, strict=True):
        assert bool((weight_gradient == 0).all()) == (count == 0)


@pytest.mark.parametrize("spacing", [1, 8])
def test_pairs_are_arranged_by_expert_in_their_order(spacing: int) -> None:
    """Catches rows that land among another expert's, sizes beyond the few, and pairs that are lost."""
    chosen = torch.randint(4, (20, 2), generator=torch.Generator().manual_seed(3)) + torch.tensor(1)  # none for 0
    places, sources, counts = arrange(chosen, 5, spacing)
    assert torch.equal(sources[places], torch.arange(40))
    assert all(count % spacing == 0 for count in counts.tolist())
    assert len(sources) >= int(counts.sum())
    for expert, share in enumerate(sources.split([*counts.tolist(), len(sources) - int(counts.sum())])[:-1]):
        pairs = (chosen.flatten() == expert).nonzero().flatten()
        assert torch.equal(share[: len(pairs)], pairs)
        assert len(share) - len(pairs) < spacing
        assert share[len(pairs) :].eq(40).all()


@pytest.mark.parametrize("tokens", [9, 150])
def test_gradients_of_the_module_in_bfloat16(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches zeros between rows that are taken for answers, and groups of any size, each a program of its own."""
    sizes: list[int] = []

    def recorded(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        sizes.extend(counts.tolist())
        return grouped_product(rows, weight, counts)

    monkeypatch.setattr(moe, "grouped_product", recorded)
    module, x = mixture(5, 2), stream(2, tokens)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    exact = torch.autograd.grad(module(x)[0], tuple(module.parameters()), upstream)
    module.float()
    # The same experts are to be chosen, whose logits are nearer to each other than bfloat16 tells apart.
    monkeypatch.setattr(module.router, "forward", lambda given: F.linear(given.double(), module.router.weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x.float())
    narrow = torch.autograd.grad(y, tuple(module.parameters()), upstream.to(y.dtype))
    assert sizes
    assert all(size % SPACING == 0 for size in sizes)
    for one, other in zip(narrow, exact, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 8 * torch.finfo(torch.bfloat16).eps


def test_gradients_of_the_module_in_float32() -> None:
    """Catches a backward of the grouped path that differs from the exact one, the router's gradient included."""
    module, x = mixture(), stream()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    exact = torch.autograd.grad(module(x)[0], tuple(module.parameters()), upstream)
    module.float()
    single = torch.autograd.grad(module(x.float())[0], tuple(module.parameters()), upstream.float())
    for one, other in zip(single, exact, strict=True):
        assert float(other.norm()) > 0
        # Sums of some 32 to 48 products at each of three levels.
        assert float((one.double() - other).norm() / other.norm()) < 100 * torch.finfo(torch.float32).eps


def test_only_the_chosen_experts_learn() -> None:
    """Catches a mixture that computes all experts and masks them, or weights that are no softmax of the chosen."""
    module = mixture(chosen=1)
    x = stream(1, 1)
    y, router_logits = module(x)
    y.square().sum().backward()
    best = int(router_logits.argmax())
    for parameter in module.experts.parameters():
        busy = parameter.grad.flatten(1).norm(dim=-1) > 0
        assert busy.tolist() == [e == best for e in range(8)]
    assert float(module.router.weight.grad.abs().max()) == 0, "with one expert its weight is 1 whatever the router says"


@torch.no_grad()
def test_only_the_chosen_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mixture that computes all experts and weighs most of them with zero."""
    module, seen, true = mixture(chosen=2).float(), [], moe.apply_experts
    monkeypatch.setattr(moe, "apply_experts", lambda *given: seen.append(given[2]) or true(*given))
    module(stream(3, 7).float())
    assert [int(counts.sum()) for counts in seen] == [3 * 7 * 2]


@torch.no_grad()
def test_tokens_do_not_see_each_other() -> None:
    """Catches a capacity that drops tokens, or groups that depend on who else is there, beyond the last bits."""
    module, x = mixture(), stream(2, 40)
    together = module(x)[0]
    for b, t in ((0, 0), (1, 39), (1, 7)):
        alone = module(x[b : b + 1, t : t + 1])[0][0, 0]
        torch.testing.assert_close(together[b, t], alone, rtol=0, atol=1e-12)
