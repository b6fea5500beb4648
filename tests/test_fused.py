"""Operations of our own for training, against the plain forms in float64; and what they are made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from thinker import attention
from thinker.attention import attend, plain, rotate, seen_from
from thinker.compiled.processor import TILES
from thinker.fused import attention as fused
from thinker.fused import kernels

# Where there should be kernels and are none, these tests fail.
narrow_alone = pytest.mark.skipif(
    not kernels.multiplies(torch.bfloat16), reason="this processor doesn't multiply bfloat16"
)

# Weights, their gradients and results are each rounded once, by half of eps at most, which adds up as noise; in float32
# so is every sum.
EPS = {torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float32: 6 * torch.finfo(torch.float32).eps}
# heads, groups, tokens, width: whole blocks and one more or less, several pieces of keys, groups shared by heads
SHAPES = [(2, 2, 32, 64), (4, 2, 33, 32), (4, 1, 95, 64), (2, 2, 128, 96), (3, 3, 129, 64), (4, 2, 300, 64)]


def draw(
    heads: int,
    groups: int,
    tokens: int,
    width: int,
    batch: int = 2,
    size: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """q, k, v of a batch as projections leave them, heads side by side, and what comes from above."""
    draws = torch.Generator().manual_seed(tokens)
    fused_rows = torch.randn(batch, tokens, (heads + 2 * groups) * width, generator=draws) * size
    parts = fused_rows.to(dtype).split([heads * width, groups * width, groups * width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    return q, k, v, torch.randn(batch, heads, tokens, width, generator=draws).to(dtype)


def outcome(form, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The output of a form and its gradients by q, k, v."""
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    y = form(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, upstream.to(y.dtype))]


def exactly(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, starts: Tensor | None = None) -> list[Tensor]:
    """The same in float64, of the plain form."""
    doubles = [x.double() for x in (q, k, v, upstream)]
    visible = None if starts is None else seen_from(starts)
    return outcome(lambda *tensors: plain(*tensors, visible, causal=starts is None)[0], *doubles)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_plain_one_gradients_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bug: a key too many is seen, a padded one counts, heads are paired or added up wrongly, a scale is lost."""
    tensors = draw(*shape, dtype=dtype)
    for got, want in zip(outcome(fused.attend, *tensors), exactly(*tensors), strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).norm() / want.norm()) < EPS[dtype]


@pytest.mark.parametrize("lengths", [[1, 299], [31, 1, 96, 172], [128, 128, 44], [299, 1], [7] * 42 + [6]])
def test_packed_texts_see_themselves_alone(lengths: list[int], dtype: torch.dtype) -> None:
    """Bug: a text sees its neighbour's end, or a block is left out that somebody sees, or is begun twice."""
    q, k, v, upstream = draw(4, 2, 300, 64, dtype=dtype)
    starts = torch.tensor(lengths).cumsum(0).roll(1)
    starts[0] = 0
    starts = torch.stack((starts.repeat_interleave(torch.tensor(lengths)), torch.zeros(300, dtype=torch.int64)))
    got = outcome(lambda *x: fused.attend(*x, starts), q, k, v, upstream)
    for one, want in zip(got, exactly(q, k, v, upstream, starts), strict=True):
        assert float((one.double() - want).norm() / want.norm()) < EPS[dtype]
    alone = outcome(fused.attend, q, k, v, upstream)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(got, alone, strict=True)), "one text is no pack"


def rotation(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of some angles."""
    angles = torch.randn(batch, 1, tokens, width // 2, generator=torch.Generator().manual_seed(batch)) * 3
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [64, 77])
def test_queries_and_keys_are_turned_first(tokens: int, batch: int, dtype: torch.dtype) -> None:
    """Bug: a row is turned by another's angles, gradients are turned on instead of back, padding is turned in."""
    q, k, v, upstream = draw(4, 2, tokens, 64, dtype=dtype)
    cos, sin = rotation(batch, tokens, 64)

    def turned_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double()), v, causal=True)[0]

    got = outcome(lambda *x: fused.attend(*x, None, (cos, sin)), q, k, v, upstream)
    want = outcome(turned_before, *(x.double() for x in (q, k, v, upstream)))
    for one, other in zip(got, want, strict=True):
        # What is turned is rounded once more.
        assert float((one.double() - other).norm() / other.norm()) < 1.5 * EPS[dtype]
    once = outcome(lambda q, k, v: fused.attend(rotate(q, cos, sin), rotate(k, cos, sin), v), q, k, v, upstream)
    assert torch.equal(got[0], once[0]), "turned in float32 and rounded, as `rotate` does"


def test_peaked_weights_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """Bug: scores of hundreds overflow, or the largest isn't taken off before the power."""
    tensors = draw(2, 2, 64, 64, size=8.0, dtype=dtype)
    got = outcome(fused.attend, *tensors)
    assert all(bool(x.isfinite().all()) for x in got)
    want = exactly(*tensors)
    # A score of some 500 in float32 is off by 500 times its eps; the rest is as above.
    scores = 500 * torch.finfo(torch.float32).eps
    assert float((got[0].double() - want[0]).norm() / want[0].norm()) < max(EPS[dtype], scores)


def test_what_is_not_finite_stays_seen(dtype: torch.dtype) -> None:
    """Bug: a run that has diverged goes on, since a NaN counts as a very small score."""
    q, k, v, _ = draw(2, 2, 64, 64, dtype=dtype)
    for spoiled in (q, k, v):
        before = spoiled[1, 1, 40, 3].item()
        spoiled[1, 1, 40, 3] = torch.nan
        y = fused.attend(q, k, v)
        assert bool(y[1, 1, 40].isnan().any())
        assert bool(y[0].isfinite().all())
        spoiled[1, 1, 40, 3] = before
    assert bool(fused.attend(q, k, v).isfinite().all())


def test_neighbours_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Bug: a thread's memory is another's, or holds what the head before has left there."""
    tensors = draw(4, 2, 77, 64, batch=3, dtype=dtype)
    together = outcome(fused.attend, *tensors)
    for row in range(3):
        for got, want in zip(outcome(fused.attend, *(x[row : row + 1] for x in tensors)), together, strict=True):
            assert torch.equal(got[0], want[row])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, outcome(fused.attend, *tensors), together))
    finally:
        torch.set_num_threads(before)


FEWER_THREADS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_fused import draw, outcome
from thinker.fused import attention
torch.set_num_threads(5)
tensors = draw(4, 2, 77, 64, batch=3, dtype=getattr(torch, sys.argv[2]))
wide = outcome(attention.attend, *tensors)
torch.set_num_threads(1)
print(all(map(torch.equal, outcome(attention.attend, *tensors), wide)))
"""


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_threads_than_asked_for_do_all_the_work(limit: int, dtype: torch.dtype) -> None:
    """Bug: where OpenMP is kept from bringing as many threads as torch counts, their parts are never done."""
    command = [sys.executable, "-c", FEWER_THREADS, str(Path(__file__).parent), str(dtype).removeprefix("torch.")]
    limits = {"OMP_THREAD_LIMIT": str(limit), "OMP_NUM_THREADS": "5"}
    result = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, timeout=300)
    assert result.stdout == "True\n", result.stderr


def test_nothing_is_read_beyond_a_row(dtype: torch.dtype) -> None:
    """Bug: rows are padded in place, by what lies behind them."""
    q, k, v, upstream = draw(2, 2, 45, 64, dtype=dtype)
    want = outcome(fused.attend, q, k, v, upstream)

    def inside(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[2] + 64, x.shape[1] + 2, x.shape[3]), torch.nan, dtype=x.dtype)
        wide[:, 32 : 32 + x.shape[2], 1:-1] = x.transpose(1, 2)
        return wide[:, 32 : 32 + x.shape[2], 1:-1].transpose(1, 2)

    assert all(map(torch.equal, outcome(fused.attend, *map(inside, (q, k, v)), inside(upstream)), want))


def test_any_strides_are_taken(dtype: torch.dtype) -> None:
    """Bug: a tensor whose last dimension isn't the inner one is read as if it were."""
    tensors = draw(2, 2, 40, 32, dtype=dtype)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors]
    assert turned[0].stride(-1) != 1
    assert all(map(torch.equal, outcome(fused.attend, *turned), outcome(fused.attend, *tensors)))


@pytest.mark.slow
def test_torch_can_compile_around_it(dtype: torch.dtype) -> None:
    """Bug: what torch is told of results' shapes and strides differs from what comes, or gradients get lost."""
    q, k, v, upstream = draw(4, 2, 70, 32, dtype=dtype)
    torch.library.opcheck(fused._forward, (q, k, v, None, None, None))
    torch.library.opcheck(fused._forward, (q, k, v, torch.zeros(2, 70, dtype=torch.int64), *rotation(1, 70, 32)))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 1.5, k, v + 1, causal=True) * 2

    plain_results = outcome(layer, q, k, v, upstream)
    for got, want in zip(outcome(torch.compile(layer), q, k, v, upstream), plain_results, strict=True):
        # The compiler rounds q * 1.5 and its like elsewhere or not at all.
        assert float((got.double() - want.double()).norm() / want.double().norm()) < EPS[dtype]


def test_attention_is_chosen_where_it_can_be(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Bug: the kernels are never taken, so that their proofs prove nothing, or taken for what they can't do."""
    lengths = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        lengths.append(q.shape[2])
        return q

    monkeypatch.setattr(fused, "attend", recorded)
    for tokens, width in ((16, 64), (17, 64), (40, 48), (40, 64)):
        q, k, v, _ = (x.requires_grad_() for x in draw(2, 2, tokens, width, dtype=dtype))
        attend(q, k, v, causal=True)
        attend(q, k, v, causal=True, starts=torch.zeros(2, tokens, dtype=torch.int64))
        attend(q, k, v)
        attend(q.detach(), k.detach(), v.detach(), causal=True)
        attend(q.half(), k.half(), v.half(), causal=True)
    assert lengths == ([17, 17, 40, 40] if dtype == kernels.numbers() else []), "what this processor trains in"


def test_without_kernels_attention_is_what_it_was(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Bug: a broken Numba, or a library of threads that isn't OpenMP's, ends training."""
    monkeypatch.setattr(kernels, "threads", lambda: (_ for _ in ()).throw(AttributeError("GOMP_parallel")))
    kernels.hindrance.cache_clear()
    try:
        assert kernels.form() == "none"
        assert kernels.hindrance(dtype) == "AttributeError: GOMP_parallel"
        q, k, v, upstream = draw(2, 2, attention.QUERY_BLOCK + 1, 64, dtype=dtype)
        got = outcome(lambda *x: attend(*x, causal=True), q, k, v, upstream)
        assert all(map(torch.equal, got, outcome(attention.blocked_causal, q, k, v, upstream)))
    finally:
        monkeypatch.undo()
        kernels.hindrance.cache_clear()
    assert kernels.is_available(dtype)


def test_no_kernel_is_run_that_is_not_there(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Bug: tiles are used that the system hasn't been asked for, which ends the process."""
    monkeypatch.setattr(kernels, "is_available", lambda dtype: False)
    with pytest.raises(AssertionError, match="asked for tiles"):
        fused.attend(*draw(2, 2, 32, 64, dtype=dtype)[:3])


PAIRS_ALONE = """
import json, sys
from pathlib import Path
from thinker.compiled import processor
processor.TILES = False
sys.path.insert(0, sys.argv[1])
from test_fused import SHAPES, draw, exactly, outcome
from thinker.fused import attention, kernels
errors = []
for shape in SHAPES:
    tensors = draw(*shape)
    for got, want in zip(outcome(attention.attend, *tensors), exactly(*tensors), strict=True):
        errors.append(float((got.double() - want).norm() / want.norm()))
print(json.dumps([kernels.form(), max(errors)]))
"""


@pytest.mark.skipif(not TILES, reason="there is one way only to multiply bfloat16 here")
def test_processors_without_tiles_come_to_the_same(tmp_path: Path) -> None:
    """Bug: what is made for tiles is wrong in pairs, which most processors have and this one needn't use."""
    command = [sys.executable, "-c", PAIRS_ALONE, str(Path(__file__).parent)]
    result = subprocess.run(
        command, env=os.environ | {"THINKER_CACHE": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    form, error = json.loads(result.stdout)
    assert form == "pairs"
    assert error < EPS[torch.bfloat16]


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def narrow(*shape: int) -> np.ndarray:
    """Random bfloat16, as int16."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.bfloat16().view(torch.int16).numpy()


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.int32) << 16).view(np.float32)


@narrow_alone
@pytest.mark.parametrize("name", ["by_tiles", "by_pairs"])
def test_products(name: str) -> None:
    """Bug: a block of rows, columns or inputs is left out, strides are mixed up, sums are not begun or gone on from."""
    from numba import njit

    from thinker.fused import moves, tiles

    if name == "by_tiles" and not TILES:
        pytest.skip("this processor has no tiles")
    assert kernels.is_available(torch.bfloat16), "the system has been asked for tiles"
    form = getattr(tiles, name)

    @njit
    def product(a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
        tiles.take_tiles()
        form(a, a_step, b, b_step, c, c_step, m, n, k, adds)
        tiles.leave_tiles()

    @njit
    def paired(rows, step, size, width, to):  # type: ignore[no-untyped-def]
        moves.interleave(rows, step, size, width, to)

    for m, n, k in ((32, 32, 32), (64, 96, 160), (96, 32, 64)):
        a, b, c = narrow(m, k + 8), narrow(k, n + 4), np.full((m, n + 16), 3, np.float32)
        right = np.zeros((k // 2, n, 2), np.int16)
        paired(address(b), n + 4, k, n, address(right))
        assert np.array_equal(right, b[:, :n].reshape(k // 2, 2, n).transpose(0, 2, 1))
        for adds in (0, 1):
            before = c[:, :n] * adds
            product(address(a), 2 * (k + 8), address(right), 4 * n, address(c), 4 * (n + 16), m, n, k, adds)
            want = before + widened(a[:, :k]).astype(np.float64) @ widened(b[:, :n])
            # k sums in float32, each of the order of sqrt(k).
            assert np.abs(c[:, :n] - want).max() < k * np.finfo(np.float32).eps * np.sqrt(k)
            assert (c[:, n:] == 3).all()


@pytest.mark.skipif(not kernels.multiplies(torch.float32), reason="this processor has no such products")
def test_products_of_float32() -> None:
    """Bug: a block of rows, columns or inputs is left out, strides are mixed up, sums are not begun or gone on from."""
    from numba import njit

    from thinker.fused import tiles

    @njit
    def product(a, a_step, b, b_step, c, c_step, m, n, k, adds):  # type: ignore[no-untyped-def]
        tiles.by_floats(a, a_step, b, b_step, c, c_step, m, n, k, adds)

    draws = np.random.default_rng(0)
    for m, n, k in ((32, 32, 32), (64, 96, 37), (8, 64, 160)):
        a, b = (draws.standard_normal(shape).astype(np.float32) for shape in ((m, k + 8), (k, n + 4)))
        c = np.full((m, n + 16), 3, np.float32)
        for adds in (0, 1):
            before = c[:, :n] * adds
            product(address(a), 4 * (k + 8), address(b), 4 * (n + 4), address(c), 4 * (n + 16), m, n, k, adds)
            want = before + a[:, :k].astype(np.float64) @ b[:, :n]
            assert np.abs(c[:, :n] - want).max() < k * np.finfo(np.float32).eps * np.sqrt(k)
            assert (c[:, n:] == 3).all()


def test_moves() -> None:
    """Bug: a block of a transposition comes to the wrong place, or padding isn't zero."""
    from numba import njit

    from thinker.fused import moves

    @njit
    def turned(source, step, rows, columns, to, to_step):  # type: ignore[no-untyped-def]
        moves.transpose(source, step, rows, columns, to, to_step)

    @njit
    def copied(source, step, count, size, width, to):  # type: ignore[no-untyped-def]
        moves.padded_rows(source, step, count, size, width, to)

    source = np.arange(48 * 40, dtype=np.int32).reshape(48, 40)
    target = np.full((32, 50), -1, np.int32)
    turned(address(source), 4 * 40, 48, 32, address(target), 4 * 50)
    assert np.array_equal(target[:, :48], source[:, :32].T)
    assert (target[:, 48:] == -1).all()
    rows, padded = narrow(5, 24), np.full((32, 20), 7, np.int16)
    copied(address(rows), 24, 5, 32, 20, address(padded))
    assert np.array_equal(padded[:5], rows[:, :20])
    assert (padded[5:] == 0).all()
