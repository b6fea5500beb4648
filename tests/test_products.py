"""Products of float32 matrices by Thinker's own kernel: against float64, and where they are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from thinker import loss
from thinker.fused import kernels, products
from thinker.linear import Linear

# Where there should be a kernel and is none, these tests fail.
pytestmark = pytest.mark.skipif(not kernels.multiplies(torch.float32), reason="there is none for this processor")

EPS = torch.finfo(torch.float32).eps


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# Rows, inputs, columns: one tile and less, whole tiles and not, several pieces, several slabs of inputs and of columns.
SHAPES = [
    (6, 16, 16),
    (1, 1, 1),
    (5, 3, 15),
    (131, 35, 37),
    (97, 1025, 48),
    (600, 256, 80),
    (7, 2100, 33),
    (8, 5, 8300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
def test_products_equal_those_in_float64(shape: tuple[int, int, int], left_turned: bool, right_turned: bool) -> None:
    """Bug: a row, column or input at an edge is left out or counted twice, or a side is read across."""
    N, K, M = shape
    left = draw(K, N).T if left_turned else draw(N, K)
    right = draw(M, K).T if right_turned else draw(K, M)
    got, want = products.product(left, right), left.double() @ right.double()
    assert got.shape == want.shape
    assert apart(got, want) < K**0.5 * EPS, "K sums in float32, whose errors are noise"


def test_parts_of_larger_matrices() -> None:
    """Bug: a part of a fused projection is read as if it were whole, or one with gaps both ways as if it had none."""
    left, right = draw(70, 40), draw(40, 50)
    want = products.product(left, right)
    for wide in (torch.full((70, 90), torch.nan), torch.full((90, 70), torch.nan).T):
        wide[:, 7:47] = left
        assert torch.equal(products.product(wide[:, 7:47], right), want)
    gaps = torch.full((80, 100), torch.nan)
    gaps[::2, ::2] = right
    assert torch.equal(products.product(left, gaps[::2, ::2]), want)


def test_threads_and_neighbours_change_no_bit() -> None:
    """Bug: sums depend on who adds them up, on a row's place in its tile or piece, or on a column's in its panel."""
    left, right, before = draw(333, 1500), draw(1500, 100), torch.get_num_threads()
    want = products.product(left, right)
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            assert torch.equal(products.product(left, right), want)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(products.product(left[5:138], right[:, 3:90]), want[5:138, 3:90])
    assert torch.equal(products.product(right.T, left.T), want.T)


def test_results_repeat_while_threads_race() -> None:
    """Bug: a slab is replaced while it is in use, or used before it is whole."""
    left, right, before = draw(40, 5000), draw(5000, 200), torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        want = products.product(left, right)
        assert all(torch.equal(products.product(left, right), want) for _ in range(200))
    finally:
        torch.set_num_threads(before)
    assert apart(want, left.double() @ right.double()) < 5000**0.5 * EPS


def test_what_is_not_finite_stays_where_it_is() -> None:
    """Bug: a run that has diverged goes on, or padding spreads it."""
    left, right = draw(20, 300), draw(300, 40)
    left[13, 280], right[7, 21] = torch.nan, torch.inf
    result = products.product(left, right)
    finite = result.isfinite()
    assert not bool(finite[13].any())
    assert not bool(finite[:, 21].any())
    assert int(finite.sum()) == 19 * 39


def step(layer: nn.Linear, x: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """A layer's outputs and gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = layer(x)
    y.backward(upstream)
    return [y.detach(), x.grad, layer.weight.grad]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, inputs and columns of each product that is taken, on a processor for which they are; however small."""
    seen, true = [], products.product

    def noted(left: Tensor, right: Tensor) -> Tensor:
        seen.append((*left.shape, right.shape[1]))
        return true(left, right)

    monkeypatch.setattr(products, "product", noted)
    monkeypatch.setattr(products, "NEGLECTED", True)
    monkeypatch.setattr(products, "WORK", 1)
    return seen


def test_layers_are_torchs(calls: list[tuple[int, ...]]) -> None:
    """Bug: the kernel is never taken, so that its proofs prove nothing; outputs or gradients are others'."""
    layer, other = Linear(80, 96), nn.Linear(80, 96, bias=False).double()
    other.load_state_dict(layer.state_dict())
    x, upstream = draw(2, 64, 80).requires_grad_(), draw(2, 64, 96)
    for got, want in zip(step(layer, x, upstream), step(other, x.double(), upstream.double()), strict=True):
        assert got is not None
        assert want is not None
        assert got.shape == want.shape
        assert apart(got, want) < 128**0.5 * EPS
    assert calls == [(128, 80, 96), (128, 96, 80), (96, 128, 80)]


def test_they_are_taken_where_they_pay_alone(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: small ones, other types, what isn't trained, or other processors' products are taken."""
    layer, x, upstream = Linear(64, 96), draw(64, 64), draw(64, 96)
    assert step(layer, x, upstream)[1] is None, "what wants no gradient gets none"
    assert calls == [(64, 64, 96), (96, 64, 64)]
    calls.clear()
    step(layer, draw(63, 64), draw(63, 96))
    step(Linear(63, 96), draw(64, 63), upstream)
    step(Linear(64, 63), x, draw(64, 63))
    step(Linear(64, 96).double(), x.double(), upstream.double())
    layer(x[0])
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    monkeypatch.setattr(products, "WORK", 64 * 64 * 96 + 1)
    step(layer, x, upstream)
    monkeypatch.setattr(products, "WORK", 1)
    monkeypatch.setattr(products, "NEGLECTED", False)
    step(layer, x, upstream)
    assert calls == []


def test_frozen_layers_take_them_for_what_is_behind(calls: list[tuple[int, ...]]) -> None:
    """Bug: a frozen layer's gradient is computed all the same, or its products left to the slower library."""
    layer, x, upstream = Linear(64, 96), draw(64, 64).requires_grad_(), draw(64, 96)
    want = step(layer, x, upstream)
    calls.clear()
    layer.requires_grad_(False)
    got = step(layer, x, upstream)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[2] is None
    assert calls == [(64, 64, 96), (64, 96, 64)]


def test_widths_that_do_not_fit_are_refused(calls: list[tuple[int, ...]]) -> None:
    """Bug: with torch's own check left out, a kernel reads beyond the weights, or leaves inputs out."""
    for inputs in (48, 80, 96):
        with pytest.raises(RuntimeError, match="shapes"):
            Linear(64, 96)(draw(128, inputs))
    assert calls == []


def test_memory_is_of_the_matrices_own_type() -> None:
    """Bug: where torch's usual type is a narrow one, float32 is written into half the room that it needs."""
    left, right = draw(64, 600), draw(600, 64)
    want = products.product(left, right)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(products.product(left, right), want)
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(products.product(left, right), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_loss_takes_them(calls: list[tuple[int, ...]]) -> None:
    """Bug: the largest products of a small model are left to the slower library."""
    hidden, head = draw(700, 64).requires_grad_(), draw(90, 64).requires_grad_()
    targets = torch.arange(700) % 90
    total = loss.cross_entropy_sum(hidden, head, targets)
    total.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    want = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    want.backward()
    assert apart(total.detach(), want.detach()) < 700**0.5 * EPS
    for got, other in zip((hidden, head), exact, strict=True):
        assert got.grad is not None
        assert other.grad is not None
        assert apart(got.grad, other.grad) < 700**0.5 * EPS
    assert len(calls) == 3 * len(hidden.split(loss.rows_at_once(head)))


@pytest.mark.slow
def test_torch_can_compile_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what torch is told of the result differs from what comes, or a matrix across is read along."""
    torch.library.opcheck(products.product, (draw(70, 20), draw(30, 20).T))
    monkeypatch.setattr(products, "NEGLECTED", True)
    monkeypatch.setattr(products, "WORK", 1)
    layer, x, upstream = Linear(64, 96), draw(2, 64, 64).requires_grad_(), draw(2, 64, 96)
    plain = [part.clone() for part in step(layer, x, upstream) if part is not None]
    for got, want in zip(step(torch.compile(layer), x, upstream), plain, strict=True):
        assert got is not None
        assert torch.equal(got, want)
