"""Conversations to rows: several in a row, none of them cut, each in a segment of its own that sees no other.

Which conversations share a row is settled once, by their lengths alone; an epoch is a shuffle of the rows. So batch k
is a pure function of the seed and k, as it is for text in `batches.py`. That a segment sees no other is the model's
part (`places` in `model.py`).

Where conversations hold pictures or sounds, rows also say which medium stands where, and which row of all epochs they
are, so that its changes can be drawn from that number.
"""

# C conversations, N tokens of all of them, R rows, T length of a row

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .batches import IGNORED, Rows

PADDING = 0  # the segment of places that hold nothing; conversations count from 1 in each row
SHORTEST_ROW = 512


@dataclass(frozen=True)
class Chats:
    """Conversations as tokens, one after the other, and which tokens are the assistant's to say."""

    tokens: np.ndarray  # (N,) uint16 or uint32
    said: np.ndarray  # (N,) bool
    starts: np.ndarray  # (C + 1,) int64: conversation i is tokens[starts[i] : starts[i + 1]]
    media: np.ndarray | None = None  # (N,) int32: number of the picture or sound whose place it is, 0 for text

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Conversation i: its ids, int64, and which of them the assistant says."""
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.tokens[part].astype(np.int64), np.asarray(self.said[part])

    def media_of(self, i: int) -> np.ndarray:
        """Which medium stands at each token of conversation i, int64, 0 for text."""
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        if self.media is None:
            return np.zeros(part.stop - part.start, np.int64)
        return self.media[part].astype(np.int64)

    @property
    def places(self) -> np.ndarray:
        """How many places each conversation takes in a row: its last token is only ever a target. (C,)"""
        return np.diff(self.starts) - 1


class PackedRows:
    """The conversations that fit into `ctx_len`, packed into rows of `length` places, at most `ctx_len`.

    Indexed by a list of rows, it gives inputs, targets and segments, each (len(list), length) int64. A target is the
    next token where the assistant says it, else `IGNORED`. With pictures or sounds also the media's numbers, of that
    shape, and the rows' numbers (len(list),), -1 for rows that nothing is drawn for.
    """

    def __init__(self, chats: Chats, ctx_len: int) -> None:
        self._chats = chats
        fitting = np.flatnonzero(chats.places <= ctx_len)
        longest = int(chats.places[fitting].max(initial=1))
        # No longer than needed: where everyone looks at everything, the cost grows with the square.
        self.length = min(ctx_len, max(SHORTEST_ROW, -(-longest // 64) * 64))
        self._rows = pack(chats.places, fitting, self.length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: Sequence[int]) -> tuple[np.ndarray, ...]:
        return self.rows(chosen, np.full(len(chosen), -1, np.int64))

    def rows(self, chosen: Sequence[int], numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """As by index, with the rows' numbers (len(chosen),)."""
        shape = (len(chosen), self.length)
        inputs, segments = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
        targets, media = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64)
        for row, number in enumerate(chosen):
            start = 0
            for segment, i in enumerate(self._rows[number], start=PADDING + 1):
                ids, said = self._chats[i]
                place = slice(start, start + len(ids) - 1)
                inputs[row, place], segments[row, place] = ids[:-1], segment
                targets[row, place] = np.where(said[1:], ids[1:], IGNORED)
                media[row, place] = self._chats.media_of(i)[:-1]
                start = place.stop
        if self._chats.media is None:
            return inputs, targets, segments
        return inputs, targets, segments, media, numbers


class PackedBatches:
    """Training batches of `rows` packed rows, fewer in the first `ramp`. Raises `ValueError` if there is nothing."""

    def __init__(self, chats: Chats, rows: int, ctx_len: int, seed: int, ramp: int = 0) -> None:
        self._packed = PackedRows(chats, ctx_len)
        if len(self._packed) == 0:
            raise ValueError(f"none of {len(chats):,} conversations fits into ctx_len {ctx_len}: raise ctx_len")
        assert rows >= 1, rows
        self._rows, self._seed = Rows(rows, ramp), seed
        self._order = (-1, np.zeros(0, np.int64))

    def batch(self, k: int) -> tuple[np.ndarray, ...]:
        """Inputs, targets and segments of batch `k`, each (rows, length) int64, and media: see `PackedRows`."""
        number = np.arange(self._rows.before(k), self._rows.before(k + 1))  # of the row, counted through all epochs
        epoch, place = np.divmod(number, len(self._packed))
        chosen = [int(self._shuffled(e)[p]) for e, p in zip(epoch.tolist(), place.tolist(), strict=True)]
        return self._packed.rows(chosen, number)

    @property
    def length(self) -> int:
        """Places in a row."""
        return self._packed.length

    @property
    def tokens_per_batch(self) -> int:
        """Places in a full batch."""
        return self._rows.full * self._packed.length

    def tokens_in(self, k: int) -> int:
        """Places in batch `k`."""
        return self._rows.of(k) * self._packed.length

    def rows_in(self, k: int) -> int:
        """Rows of batch `k`."""
        return self._rows.of(k)

    def epochs(self, k: int) -> float:
        """How often the conversations have been seen before batch `k`."""
        return self._rows.before(k) / len(self._packed)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order in which they come."""
        order = self._order
        if order[0] != epoch:
            # Raw draws and a stable sort: see `Batches`.
            draws = np.random.Philox(key=np.array([self._seed, epoch], np.uint64)).random_raw(len(self._packed))
            order = (epoch, np.argsort(draws, kind="stable"))
            self._order = order
        return order[1]


def pack(places: np.ndarray, chosen: np.ndarray, length: int) -> list[list[int]]:
    """The chosen conversations in rows of `length`: the longest first, each into the fullest row that has room.

    places [5, 3, 4, 2, 1] in rows of 8 gives [[0, 1], [2, 3, 4]].
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free places and the row's number, sorted
    for i in chosen[np.argsort(-places[chosen], kind="stable")].tolist():
        need = int(places[i])
        assert 1 <= need <= length, (need, length)
        at = bisect.bisect_left(room, (need, -1))
        if at == len(room):
            free, row = length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(i)
        if free > need:
            bisect.insort(room, (free - need, row))
    return rows
