"""Tokens to batches: batch k is a pure function of the seed and k, so there is nothing to restore when a run goes on.

An epoch is a shuffle of windows without replacement, begun at its own offset so that windows differ between epochs.
Only the order of the epoch at hand is kept, and it can always be computed again. How many rows a device or a process
takes of a batch is the training loop's matter: it slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100  # a target that the loss doesn't count


@dataclass(frozen=True)
class Rows:
    """How many rows batch k has: `full`, but a quarter of them in the first half of `ramp` batches, then half.

    Few rows are enough as long as gradients agree ("An Empirical Model of Large-Batch Training", arXiv 1812.06162).
    """

    full: int
    ramp: int = 0

    def of(self, k: int) -> int:
        """The rows of batch k."""
        return self.before(k + 1) - self.before(k)

    def before(self, k: int) -> int:
        """The rows of all batches before k. With 8 rows and a ramp of 4: 0, 2, 4, 8, 12, 20, 28, …"""
        half = self.ramp // 2
        quarters, halves, whole = min(k, half), min(max(k - half, 0), self.ramp - half), max(k - self.ramp, 0)
        return quarters * max(1, self.full // 4) + halves * max(1, self.full // 2) + whole * self.full


class Batches:
    """Training batches of `rows` windows of `ctx_len` tokens, out of one long array of tokens. Raises `ValueError`.

    The first `ramp` batches have fewer rows: see `Rows`.
    """

    # W windows an epoch, R rows, T ctx_len

    def __init__(self, tokens: np.ndarray, rows: int, ctx_len: int, seed: int, ramp: int = 0) -> None:
        if len(tokens) < ctx_len + 1:
            raise ValueError(
                f"{len(tokens):,} tokens found, at least {ctx_len + 1:,} needed for ctx_len {ctx_len}: "
                "give more text, or lower ctx_len"
            )
        if rows < 1:
            raise ValueError(f"a batch of {rows} rows is impossible: at least 1 is needed")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed} is out of range: choose 0 to {(1 << 64) - 1}")
        self._tokens = tokens
        self._rows = Rows(rows, ramp)
        self._ctx_len = ctx_len
        self._seed = seed
        # The last token is only ever a target. One window less than would fit leaves room for the offset.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // ctx_len - 1)
        self._order = (-1, np.zeros(0, np.int64))

    def batch(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of batch `k`, both (rows, ctx_len) int64; a target is the token after its input."""
        number = np.arange(self._rows.before(k), self._rows.before(k + 1))  # of the window, counted through all epochs
        epoch, place = np.divmod(number, self.windows_per_epoch)
        starts = [self._starts(e)[p] for e, p in zip(epoch.tolist(), place.tolist(), strict=True)]
        windows = np.stack([self._tokens[start : start + self._ctx_len + 1] for start in starts])  # (R, T + 1)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    @property
    def tokens_per_batch(self) -> int:
        """Places in a full batch."""
        return self._rows.full * self._ctx_len

    def tokens_in(self, k: int) -> int:
        """Places in batch `k`."""
        return self._rows.of(k) * self._ctx_len

    def rows_in(self, k: int) -> int:
        """Rows of batch `k`."""
        return self._rows.of(k)

    def epochs(self, k: int) -> float:
        """How often the text has been seen before batch `k`."""
        return self._rows.before(k) / self.windows_per_epoch

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in the order in which they come: (W,) int64."""
        order = self._order
        if order[0] != epoch:
            # Raw draws and a stable sort, because numpy promises their values for all versions to come and those of
            # its `permutation` for none.
            key = np.array([self._seed, epoch], np.uint64)
            draws = np.random.Philox(key=key).random_raw(self.windows_per_epoch + 1)
            room = len(self._tokens) - 1 - self.windows_per_epoch * self._ctx_len
            offset = int(draws[0]) % (room + 1)
            order = (epoch, offset + self._ctx_len * np.argsort(draws[1:], kind="stable"))
            self._order = order
        return order[1]


class Windows:
    """Held-out tokens in order, for validation: every token but the first is a target once.

    Indexed by a list of windows, it gives their inputs and targets, (len(list), ctx_len) int64, and reads only those
    into memory. Places that the last window lacks have the target `IGNORED`.
    """

    def __init__(self, tokens: np.ndarray, ctx_len: int) -> None:
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens found, at least 2 needed: give more held-out text")
        self._tokens = tokens
        self._ctx_len = ctx_len

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._ctx_len)

    def __getitem__(self, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.zeros((len(chosen), self._ctx_len), np.int64)
        targets = np.full((len(chosen), self._ctx_len), IGNORED, np.int64)
        for row, window in enumerate(chosen):
            assert 0 <= window < len(self), (window, len(self))
            part = self._tokens[window * self._ctx_len : (window + 1) * self._ctx_len + 1]
            inputs[row, : len(part) - 1] = part[:-1]
            targets[row, : len(part) - 1] = part[1:]
        return inputs, targets
