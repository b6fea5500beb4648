"""Batches: a pure function of seed and number, every window once an epoch, and the whole held-out text in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinker.data.batches import IGNORED, Batches, Rows, Windows

COUNTING = np.arange(1000, dtype=np.uint16)  # so that a token tells where it stood


def starts(batches: Batches, first: int, last: int) -> list[int]:
    """Where the windows of some batches begin."""
    return [int(row[0]) for k in range(first, last) for row in batches.batch(k)[0]]


def test_targets_are_the_next_tokens() -> None:
    """Targets that are shifted wrongly teach the model to copy, with a wonderful loss."""
    inputs, targets = Batches(COUNTING, rows=3, ctx_len=16, seed=5).batch(2)
    assert inputs.shape == targets.shape == (3, 16)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
    np.testing.assert_array_equal(targets, inputs + 1)


def test_a_batch_depends_on_its_number_alone() -> None:
    """Batches that depend on what was asked before repeat or skip text when a run is resumed."""
    asked_in_order = Batches(COUNTING, rows=4, ctx_len=16, seed=5)
    expected = [asked_in_order.batch(k) for k in range(60)]
    asked_wildly = Batches(COUNTING.copy(), rows=4, ctx_len=16, seed=5)
    for k in (59, 3, 30, 3, 15, 14, 0, 45):
        np.testing.assert_array_equal(asked_wildly.batch(k), expected[k])


def test_values_stay() -> None:
    """Another order after an update of numpy or of this code would break every resumed run in silence."""
    assert starts(Batches(COUNTING, rows=6, ctx_len=100, seed=0), 0, 2) == [
        159, 59, 759, 459, 359, 259, 559, 659, 438, 238, 638, 738,
    ]  # fmt: skip
    assert starts(Batches(COUNTING, rows=6, ctx_len=100, seed=1), 0, 1) == [287, 487, 187, 687, 787, 587]


@given(
    tokens=st.integers(2, 300), rows=st.integers(1, 9), ctx_len=st.integers(1, 299), seed=st.integers(0, (1 << 64) - 1)
)
def test_every_window_once_an_epoch(tokens: int, rows: int, ctx_len: int, seed: int) -> None:
    """Drawing with replacement leaves a third of the text unseen in an epoch; an epoch may begin inside a batch."""
    ctx_len = min(ctx_len, tokens - 1)
    batches = Batches(COUNTING[:tokens], rows, ctx_len, seed)
    count = batches.windows_per_epoch
    assert (tokens - 1) / ctx_len - 3 < count <= (tokens - 1) / ctx_len
    seen = starts(batches, 0, -(-3 * count // rows))
    for epoch in range(3):
        begun = np.sort(seen[epoch * count : (epoch + 1) * count])
        assert len(begun) == count
        assert begun[0] >= 0
        assert begun[-1] + ctx_len + 1 <= tokens
        np.testing.assert_array_equal(np.diff(begun), ctx_len)


def test_epochs_differ() -> None:
    """The same windows in every epoch, or the same order, teach borders that the text doesn't have."""
    batches = Batches(COUNTING, rows=1, ctx_len=16, seed=5)
    count = batches.windows_per_epoch
    epochs = [starts(batches, e * count, (e + 1) * count) for e in range(8)]
    assert len({min(epoch) for epoch in epochs}) > 1
    assert len({tuple(np.subtract(epoch, min(epoch))) for epoch in epochs}) == 8
    assert starts(Batches(COUNTING, 1, 16, seed=6), 0, count) != epochs[0]


def test_no_token_is_out_of_reach() -> None:
    """A beginning or an end that no offset reaches is text that was never learnt."""
    batches = Batches(COUNTING[:100], rows=1, ctx_len=16, seed=5)
    seen = starts(batches, 0, 200 * batches.windows_per_epoch)
    assert min(seen) == 0
    assert max(seen) + 16 == 99


def test_epochs_are_counted() -> None:
    """A wrong count tells the user that the text was seen more often than it was."""
    batches = Batches(COUNTING, rows=4, ctx_len=16, seed=5)
    assert batches.windows_per_epoch == 999 // 16 - 1 == 61
    assert batches.epochs(0) == 0
    assert batches.epochs(61) == 4.0


def test_the_smallest_text() -> None:
    """ctx_len + 1 tokens are enough for one window, and one fewer is too few: both must be said, not found out."""
    inputs, targets = Batches(COUNTING[:17], rows=2, ctx_len=16, seed=0).batch(7)
    np.testing.assert_array_equal(inputs, [range(16)] * 2)
    np.testing.assert_array_equal(targets, [range(1, 17)] * 2)
    with pytest.raises(ValueError, match="16 tokens found, at least 17 needed for ctx_len 16"):
        Batches(COUNTING[:16], rows=2, ctx_len=16, seed=0)


def test_impossible_requests() -> None:
    """Mistakes in rows and seed must be named, not end in an error of numpy's."""
    with pytest.raises(ValueError, match="0 rows"):
        Batches(COUNTING, rows=0, ctx_len=16, seed=0)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=f"seed {seed} is out of range"):
            Batches(COUNTING, rows=1, ctx_len=16, seed=seed)


@given(tokens=st.integers(2, 200), ctx_len=st.integers(1, 250), rows=st.integers(1, 7))
def test_windows_cover_the_text_once(tokens: int, ctx_len: int, rows: int) -> None:
    """A held-out loss that leaves the last tokens out, or counts some twice, is no loss of that text."""
    windows = Windows(COUNTING[:tokens], ctx_len)
    found: list[int] = []
    for start in range(0, len(windows), rows):
        chosen = range(start, min(start + rows, len(windows)))
        inputs, targets = windows[chosen]
        assert inputs.shape == targets.shape == (len(chosen), ctx_len)
        assert inputs.dtype == targets.dtype == np.int64
        counted = targets != IGNORED
        np.testing.assert_array_equal(targets[counted], inputs[counted] + 1)
        assert (inputs >= 0).all()
        found += targets[counted].tolist()
    assert found == list(range(1, tokens))


def test_windows_need_two_tokens() -> None:
    """A mean over no tokens is NaN, and the message would come from somewhere else."""
    with pytest.raises(ValueError, match="1 tokens found, at least 2 needed"):
        Windows(COUNTING[:1], 16)


@given(full=st.integers(1, 40), ramp=st.integers(0, 30))
def test_a_ramp_has_a_quarter_then_half_then_all_rows(full: int, ramp: int) -> None:
    """A ramp whose sums don't agree with its rows shows windows twice and leaves others out."""
    rows = Rows(full, ramp)
    sizes = [rows.of(k) for k in range(ramp + 5)]
    assert sizes[: ramp // 2] == [max(1, full // 4)] * (ramp // 2)
    assert sizes[ramp // 2 : ramp] == [max(1, full // 2)] * (ramp - ramp // 2)
    assert sizes[ramp:] == [full] * 5
    assert [rows.before(k) for k in range(ramp + 6)] == [sum(sizes[:k]) for k in range(ramp + 6)]


def test_a_ramp_shows_the_same_windows_in_the_same_order() -> None:
    """A batch that depends on what was asked before, or windows that are skipped where the ramp ends."""
    plain = starts(Batches(COUNTING, rows=1, ctx_len=16, seed=5), 0, 40)
    ramped = Batches(COUNTING, rows=8, ctx_len=16, seed=5, ramp=4)
    assert starts(ramped, 0, 7) == plain[: 2 + 2 + 4 + 4 + 8 + 8 + 8]
    assert starts(Batches(COUNTING, rows=8, ctx_len=16, seed=5, ramp=4), 5, 6) == plain[20:28]
    assert [ramped.tokens_in(k) for k in range(6)] == [32, 32, 64, 64, 128, 128]
    assert ramped.tokens_per_batch == 128
    assert ramped.epochs(4) == 12 / ramped.windows_per_epoch
