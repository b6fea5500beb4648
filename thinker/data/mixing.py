"""Text among conversations: some rows of every batch are windows of text, so that a model goes on writing as it did.

Batch k is as pure a function of the seed and k as the batches it is made of (`packing.py`, `batches.py`).
"""

# R rows of a batch, T places of a row

from __future__ import annotations

import numpy as np

from .batches import Batches
from .packing import PADDING, PackedBatches

TEXT_ROWS = 1 << 40  # where the numbers of text rows begin: nothing is drawn for them


class MixedBatches:
    """Batches of packed rows with windows of text between them, of the same length, evenly spread."""

    def __init__(self, chats: PackedBatches, text: Batches, rows: int, fingerprint: str) -> None:
        self._chats, self._text = chats, text
        self.fingerprint = fingerprint  # of the text's tokens
        text_rows = rows - chats.rows_in(0)
        assert text_rows >= 1, (rows, text_rows)
        # Of 5 rows, 2 of text: [1, 3] are theirs. A micro-batch then has its share of both.
        self._places = (np.arange(text_rows) * rows + rows // 2) // text_rows
        self._rows = rows

    def batch(self, k: int) -> tuple[np.ndarray, ...]:
        """As `PackedBatches.batch`, R rows; a window of text is one segment, and every place of it counts."""
        packed = self._chats.batch(k)
        inputs, targets = self._text.batch(k)
        rows = [inputs, targets, np.full_like(inputs, PADDING + 1)]
        if len(packed) > len(rows):
            rows += [np.zeros_like(inputs), TEXT_ROWS + k * len(inputs) + np.arange(len(inputs))]
        order = np.argsort(np.concatenate([np.delete(np.arange(self._rows), self._places), self._places]))
        return tuple(np.concatenate(pair)[order] for pair in zip(packed, rows, strict=True))

    @property
    def tokens_per_batch(self) -> int:
        """Places in a batch."""
        return self._chats.tokens_per_batch + self._text.tokens_per_batch

    def tokens_in(self, k: int) -> int:
        """Places in batch `k`: all are alike."""
        return self.tokens_per_batch

    def rows_in(self, k: int) -> int:
        """Rows of batch `k`."""
        return self._rows

    def epochs(self, k: int) -> float:
        """How often the conversations have been seen before batch `k`."""
        return self._chats.epochs(k)
