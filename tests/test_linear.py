"""Layers without a bias: their weights' gradient by tiles against float64, and where it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinker.compiled.processor import TILES
from thinker.fused import kernels, weights
from thinker.linear import Linear

# Where there should be kernels and are none, these tests fail.
by_tiles = pytest.mark.skipif(not (kernels.multiplies(torch.bfloat16) and TILES), reason="this processor has no tiles")

EPS = torch.finfo(torch.float32).eps


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def step(layer: nn.Linear, x: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """A layer's outputs, and its gradients, as a training in bfloat16 has them."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(upstream)
    return [y.detach(), x.grad, layer.weight.grad]


# Tokens, outputs, inputs: one block and several, whole and not; shared out by outputs, and by inputs.
@by_tiles
@pytest.mark.parametrize(
    "shape", [(32, 32, 32), (288, 64, 96), (256, 1120, 288), (544, 96, 608), (1056, 160, 64)], ids=str
)
def test_gradients_are_added_up_in_float32(shape: tuple[int, int, int]) -> None:
    """Bug: a block of tokens, rows or columns is left out, or holds what was there before; sums are rounded between."""
    N, M, K = shape
    y_grad, x = draw(N, M), draw(N, K).flip(0)
    got, want = weights.gradient(y_grad, x), y_grad.double().T @ x.double()
    assert float((got - want).norm() / want.norm()) < N**0.5 * EPS, "N sums in float32, whose errors are noise"


@by_tiles
@pytest.mark.parametrize("sizes", [(64, 0, 288, 32), (0, 0, 32), (32,)], ids=str)
def test_groups_have_gradients_of_their_own(sizes: tuple[int, ...]) -> None:
    """Bug: a group's tokens are another's, one without any has a gradient, or what is behind the last counts."""
    y_grad, x = draw(sum(sizes) + 50, 96), draw(sum(sizes) + 50, 64)
    x[sum(sizes) :] = torch.nan
    got = weights.gradient(y_grad, x, torch.tensor(sizes).cumsum(0))
    assert got.shape == (len(sizes), 96, 64)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for one, end, size in zip(got, ends, sizes, strict=True):
        alone = weights.gradient(y_grad[end - size : end], x[end - size : end]) if size else torch.zeros(96, 64)
        assert torch.equal(one, alone)


@by_tiles
def test_gradients_of_any_strides() -> None:
    """Bug: a part of a fused projection is read as if it were whole, or a matrix across as if along."""
    y_grad, x = draw(64, 96), draw(64, 64)
    want = weights.gradient(y_grad, x)
    wide = torch.full((64, 200), torch.nan, dtype=torch.bfloat16)
    wide[:, 7:103] = y_grad
    assert torch.equal(weights.gradient(wide[:, 7:103], x), want)
    assert torch.equal(weights.gradient(y_grad.T.contiguous().T, x.T.contiguous().T), want)


@by_tiles
def test_threads_change_no_bit() -> None:
    """Bug: what a thread adds up depends on how many there are, or its memory is another's."""
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            seen.append([weights.gradient(draw(320, M), draw(320, K)) for M, K in ((96, 64), (64, 96))])
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, others, seen[0])) for others in seen)


@by_tiles
def test_what_is_not_finite_stays_seen() -> None:
    """Bug: a run that has diverged goes on."""
    y_grad, x = draw(64, 32), draw(64, 32)
    x[40, 3] = torch.nan
    assert weights.gradient(y_grad, x).isnan().sum(dim=0).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_torchs(dtype: torch.dtype) -> None:
    """Bug: outputs or gradients are others', or of other types, than those of a layer of torch's."""
    layer, other = Linear(64, 96), nn.Linear(64, 96, bias=False)
    other.load_state_dict(layer.state_dict())
    x, upstream = draw(2, 32, 64, dtype=dtype).requires_grad_(), draw(2, 32, 96)
    for got, want in zip(step(layer, x, upstream), step(other, x, upstream), strict=True):
        assert got is not None
        assert want is not None
        assert got.dtype == want.dtype
        assert float((got - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps
    y, x_grad, _ = step(other, x, upstream)
    got, got_grad, _ = step(layer, x, upstream)
    assert torch.equal(got, y)
    assert torch.equal(got_grad, x_grad)


@by_tiles
def test_it_is_chosen_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the kernel is never taken, so that its proofs prove nothing, or taken for what it can't do."""
    calls = []
    true = weights.gradient
    monkeypatch.setattr(weights, "gradient", lambda y_grad, x: calls.append(tuple(y_grad.shape)) or true(y_grad, x))

    def run(tokens: int, inputs: int, outputs: int, trained: bool = True) -> Tensor | None:
        layer = Linear(inputs, outputs)
        layer.weight.requires_grad_(trained)
        x = draw(tokens, inputs, dtype=torch.float32)
        return step(layer, x if trained else x.requires_grad_(), draw(tokens, outputs))[1]

    assert run(64, 32, 96) is None, "what wants no gradient gets none"
    assert run(64, 32, 96, trained=False) is not None
    for odd in ((33, 32, 96), (64, 48, 96), (64, 32, 40)):
        run(*odd)
    layer, x = Linear(32, 32), draw(32, 32, dtype=torch.float32)
    layer(x).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert calls == [(64, 96)]


@by_tiles
@pytest.mark.slow
def test_torch_can_compile_around_it() -> None:
    """Bug: what torch is told of the result differs from what comes, or a type changes on the way."""
    torch.library.opcheck(weights.gradient, (draw(64, 96), draw(64, 32)))
    layer, x, upstream = Linear(64, 96), draw(2, 32, 64, dtype=torch.float32).requires_grad_(), draw(2, 32, 96)
    plain = step(layer, x, upstream)
    plain = [part.clone() for part in plain if part is not None]
    compiled = step(torch.compile(layer), x, upstream)
    for got, want in zip(compiled, plain, strict=True):
        assert got is not None
        assert got.dtype == want.dtype
        assert float((got - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps
