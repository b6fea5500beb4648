"""What `fused/` does to a token's numbers alone, against the plain forms in float64: activations, norms, the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thinker import loss
from thinker.activations import gated
from thinker.fused import cross_entropy, gating, kernels, norm
from thinker.loss import IGNORE, cross_entropy_sum
from thinker.model import RMSNorm

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float32)}
NORM_EPS = 1e-5


# Where there should be kernels and are none, these tests fail.
needs_kernels = pytest.mark.skipif(
    not kernels.multiplies(kernels.numbers()), reason="there are none for this processor"
)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * size).to(dtype)


def outcome(form: Callable[..., Tensor], upstream: Tensor, *tensors: Tensor) -> list[Tensor]:
    """A form's result and its gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = form(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def exactly(form: Callable[..., Tensor], upstream: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The same in float64."""
    return outcome(form, *(x.double() for x in (upstream, *tensors)))


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS) * scale


def own_norm(x: Tensor, scale: Tensor) -> Tensor:
    return norm.normed(x, scale, NORM_EPS)


def heads(dtype: torch.dtype, tokens: int = 45, width: int = 64) -> Tensor:
    """Queries of two rows, three heads each, as a projection leaves them beside keys and values: (2, 3, tokens, W)."""
    fused = draw(2, tokens, 9 * width, dtype=dtype)
    return fused.chunk(3, dim=-1)[1].unflatten(-1, (3, width)).transpose(1, 2)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (7, 1024)])
def test_gates_equal_the_plain_ones_gradients_too(shape: tuple[int, ...], size: float, dtype: torch.dtype) -> None:
    """Bug: a vector is left out between two threads, a slope is that of the sigmoid, large gates overflow."""
    upstream, up = draw(*shape, dtype=dtype).flip(0), draw(*shape, dtype=dtype).flip(-1)
    gate = draw(*shape, size=size, dtype=dtype)
    got, want = outcome(gating.gated, upstream, gate, up), exactly(silu_gate, upstream, gate, up)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        # Rounded once, or in float32 at every step: there the exponent is off by half an eps of itself, some 10.
        assert apart(one, other) < (EPS[dtype] / 2 if dtype == torch.bfloat16 else 5 * EPS[dtype])


def test_gates_of_any_strides(dtype: torch.dtype) -> None:
    """Bug: a half of a fused projection is read as if it were whole."""
    both, upstream = draw(6, 5, 64, dtype=dtype), draw(6, 5, 32, dtype=dtype)
    whole = outcome(gating.gated, upstream, *(x.contiguous() for x in both.chunk(2, dim=-1)))
    assert all(map(torch.equal, outcome(gating.gated, upstream, *both.chunk(2, dim=-1)), whole))
    turned = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, outcome(gating.gated, turned, *both.chunk(2, dim=-1)), whole))


@pytest.mark.parametrize("shape", [(32,), (130, 16), (2, 77, 256), (2, 3, 45, 64)])
def test_norms_equal_the_plain_ones_gradients_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bug: a mean is over too much, the scale's gradient lacks the last block of rows, or holds what was there."""
    x, scale = draw(*shape, dtype=dtype), draw(shape[-1], dtype=torch.float32) + 2
    upstream = draw(*shape, dtype=dtype).flip(-1)
    got, want = outcome(own_norm, upstream, x, scale), exactly(plain_norm, upstream, x, scale)
    assert [part.dtype for part in got] == [dtype, dtype, torch.float32]
    for one, other in zip(got[:2], want[:2], strict=True):
        assert apart(one, other) < EPS[dtype], "sums and roots of a row in float32, then rounded once"
    assert apart(got[2], want[2]) < 4 * EPS[torch.float32], "adding up in float32"


def test_norms_of_heads(dtype: torch.dtype) -> None:
    """Bug: strides of heads and tokens are mixed up, or results lie so that attention has to copy them."""
    x, scale, upstream = heads(dtype), draw(64, dtype=torch.float32), draw(2, 3, 45, 64, dtype=dtype)
    got = outcome(own_norm, upstream, x, scale)
    want = outcome(own_norm, upstream, x.contiguous(), scale)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert apart(got[2], want[2].double()) < 4 * EPS[torch.float32]
    assert own_norm(x, scale).transpose(1, 2).is_contiguous()


def test_norms_of_any_strides(dtype: torch.dtype) -> None:
    """Bug: rows that lie across the memory are read as if they lay along it, or results written to a copy."""
    x, scale = draw(3, 11, 32, dtype=dtype), draw(32, dtype=torch.float32)
    upstream = x.flip(-1)
    want = outcome(own_norm, upstream, x, scale)
    across = [part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in (x, upstream)]
    assert all(map(torch.equal, outcome(own_norm, upstream, across[0], scale), want))
    assert all(map(torch.equal, outcome(own_norm, across[1], x, scale), want))
    assert torch.equal(own_norm(x[:1].expand(3, 11, 32), scale)[2], want[0][0])


@needs_kernels
def test_widths_that_do_not_fit_are_refused() -> None:
    """Bug: with torch's own check left out, a kernel reads beyond the scale, or uses a part of it."""
    for width in (32, 128):
        with pytest.raises(RuntimeError, match="must match"):
            RMSNorm(64, NORM_EPS)(draw(3, width, dtype=torch.float32).requires_grad_())


def exact_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient, in float64."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def targets_for(rows: int, columns: int) -> Tensor:
    """The first column, the last, an ignored row, and others."""
    targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(columns))
    targets[:3] = torch.tensor([0, columns - 1, IGNORE])
    return targets


@pytest.mark.parametrize("size", [0.1, 4.0, 40.0])
@pytest.mark.parametrize("columns", [1, 7, 16, 31, 5000])
def test_losses_equal_the_plain_ones_gradients_too(columns: int, size: float, dtype: torch.dtype) -> None:
    """Bug: a row's tail is left out, or counted twice; the largest logit isn't taken off; ignored rows teach."""
    logits, targets = draw(9, columns, size=size, dtype=dtype), targets_for(9, columns)
    want, want_grad = exact_losses(logits, targets)
    got = cross_entropy.losses(logits, targets, IGNORE)  # and logits are now their gradients
    # Powers are off by 4e-6 of themselves at most, and so is their sum; a logit of 160 by its eps.
    assert float((got - want).abs().max()) < 4e-6 + size * 4 * EPS[torch.float32]
    assert not logits[2].any()
    # Of p - 1 as well only the result is rounded; in float32 a power is off as a logit is.
    limit = EPS[dtype] / 2 if dtype == torch.bfloat16 else (1 + size * 4) * EPS[dtype]
    assert float((logits.double() - want_grad).abs().max()) < limit


def test_losses_stay_in_their_rows(dtype: torch.dtype) -> None:
    """Bug: the last vector of a row is written over the next row, or over what lies behind the last."""
    rows, columns, guard = 5, 21, 7.0
    room = torch.full((rows * columns + 64,), guard, dtype=dtype)
    inside = room[32:-32].view(rows, columns)
    inside.copy_(draw(rows, columns, dtype=dtype))
    alone = [inside[row : row + 1].clone() for row in range(rows)]
    targets = targets_for(rows, columns)
    together = cross_entropy.losses(inside, targets, IGNORE)
    assert bool((room[:32] == guard).all() & (room[-32:] == guard).all())
    for row, one in enumerate(alone):
        assert torch.equal(cross_entropy.losses(one, targets[row : row + 1], IGNORE)[0], together[row])
        assert torch.equal(one[0], inside[row])


def test_a_target_outside_the_vocabulary_is_no_address(dtype: torch.dtype) -> None:
    """Bug: memory is read and written wherever a wrong target points to."""
    logits = draw(3, 32, dtype=dtype)
    losses = cross_entropy.losses(logits, torch.tensor([5, 32, -7]), IGNORE)
    assert losses.isnan().tolist() == [False, True, True]


def test_what_is_not_finite_stays_seen(dtype: torch.dtype) -> None:
    """Bug: a run that has diverged goes on, since a NaN counts as a small number."""
    for place in (3, 20):
        logits = draw(2, 21, dtype=dtype)
        logits[1, place] = torch.nan
        losses = cross_entropy.losses(logits, torch.tensor([1, 2]), IGNORE)
        assert losses.isnan().tolist() == [False, True]
    gate, up, scale = draw(2, 32, dtype=dtype), draw(2, 32, dtype=dtype), torch.ones(32)
    gate[1, 4] = up[1, 5] = torch.nan
    assert gating.gated(gate, up).isnan()[1, 4:6].all()
    assert own_norm(gate, scale).isnan().any(dim=1).tolist() == [False, True]


def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Bug: what is added up depends on who adds it, or a thread's row of powers is another's."""
    gate, x, logits = (draw(*shape, dtype=dtype) for shape in ((33, 48), (333, 48), (33, 500)))
    up, scale = gate * 2, draw(48, dtype=torch.float32)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            errors = logits.clone()
            losses = cross_entropy.losses(errors, targets_for(33, 500), IGNORE)
            norms = outcome(own_norm, x.flip(0), x, scale)
            seen.append([*outcome(gating.gated, up, gate, up), *norms, losses, errors])
    finally:
        torch.set_num_threads(before)
    for others in seen[1:]:
        assert all(map(torch.equal, others, seen[0]))


@needs_kernels
def test_they_are_chosen_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the kernels are never taken, so that their proofs prove nothing, or taken for what they can't do."""
    calls = []

    def recorded(name: str, result: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: calls.append(name) or result(*arguments)

    monkeypatch.setattr(gating, "gated", recorded("gate", lambda gate, up: gate))
    monkeypatch.setattr(norm, "normed", recorded("norm", lambda x, scale, eps: x))
    monkeypatch.setattr(cross_entropy, "losses", recorded("loss", lambda logits, *_: logits[:, 0].float()))
    for width, kind in ((48, torch.bfloat16), (40, torch.bfloat16), (48, torch.float32), (48, torch.float64)):
        x = draw(4, width, dtype=kind).requires_grad_()
        gated(F.silu, x, x)
        gated(F.gelu, x, x)
        gated(F.silu, x.detach(), x)
        RMSNorm(width, NORM_EPS)(x)
        RMSNorm(width, NORM_EPS)(x.detach())
        with torch.autocast("cpu", torch.bfloat16):
            RMSNorm(width, NORM_EPS)(x.float())
        RMSNorm(width, NORM_EPS).double()(x)
        cross_entropy_sum(x, draw(9, width, dtype=kind), targets_for(4, 9))
    narrow = ["gate", "norm", "norm", "loss", "loss", "norm", "norm"]  # norms of float32 too, where products are narrow
    assert calls == (narrow if kernels.numbers() == torch.bfloat16 else ["gate", "norm", "loss"])


@needs_kernels
def test_nothing_is_compiled_for_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a norm, which both kinds of training want, has the other kind's kernels compiled: 200 MB of a compiler."""
    asked, available = [], kernels.is_available
    monkeypatch.setattr(kernels, "is_available", lambda dtype: asked.append(dtype) or available(dtype))
    norm._forward(draw(4, 48, dtype=torch.float32), draw(48, dtype=torch.float32), NORM_EPS)
    assert asked == [kernels.numbers()]


def test_without_kernels_all_is_what_it_was(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Bug: a broken Numba ends training."""
    monkeypatch.setattr(kernels, "is_available", lambda dtype: False)
    x, upstream = draw(3, 48, dtype=dtype), draw(3, 48, dtype=dtype)
    assert all(
        map(
            torch.equal,
            *(outcome(form, upstream, x, x) for form in (lambda gate, up: gated(F.silu, gate, up), silu_gate)),
        )
    )
    module = RMSNorm(48, NORM_EPS)
    assert torch.equal(module(x.requires_grad_()), module(x.detach()))
    logits, targets = draw(9, 40, dtype=dtype), targets_for(9, 40)
    total, errors = loss._loss_and_error(logits, targets)
    want, want_grad = exact_losses(logits, targets)
    assert abs(float(total) - float(want.sum())) < 1e-4
    assert apart(errors, want_grad) < (EPS[dtype] / 2 if dtype == torch.bfloat16 else 2 * EPS[dtype])


@pytest.mark.slow
def test_torch_can_compile_around_them(dtype: torch.dtype) -> None:
    """Bug: what torch is told of results differs from what comes, or logits are used after they are gone."""
    torch.library.opcheck(gating._forward, tuple(draw(2, 4, 48, dtype=dtype)))
    torch.library.opcheck(norm._forward, (heads(dtype), draw(64, dtype=torch.float32), NORM_EPS))
    torch.library.opcheck(cross_entropy._take_softmax, (draw(9, 40, dtype=dtype), targets_for(9, 40), IGNORE))

    targets = targets_for(1024, 40)

    def step(x: Tensor, up: Tensor, head: Tensor) -> Tensor:
        return cross_entropy_sum(gated(F.silu, x * 2, up), head, targets)

    x, head = draw(1024, 48, dtype=dtype), draw(40, 48, dtype=dtype)
    tensors = x, x.flip(0) + 1, head
    compiled, plain = (outcome(form, torch.ones(()), *tensors) for form in (torch.compile(step), step))
    exact = outcome(step, torch.ones((), dtype=torch.float64), *(tensor.double() for tensor in tensors))
    for got, want, true in zip(compiled, plain, exact, strict=True):
        # The compiler rounds x * 2 and its like elsewhere or not at all.
        assert apart(got, true) < 1.5 * max(apart(want, true), EPS[dtype])
