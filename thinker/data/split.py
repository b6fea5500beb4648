"""Which side of the split a document is on: to train, or held out for validation.

A named set has its own rule, documented with it in `named.py`. Of everything else, one document in 25 is held out by a
stable hash (of a file's path within its folder, or of a row's text), as long as that is 1 to 15 % of the bytes;
otherwise (one big file, a few files) the last 5 % of the bytes, from a line's beginning.

How a text is read (`reading.py`), and what `--data` may name (`sources.py`), are no concern of this room.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, Literal

from .progress import byte_bar
from .reading import Document

Split = Literal["train", "valid"]

HELD_OUT_ONE_IN = 25
HELD_OUT_TAIL = 0.05


def held_out(key: str) -> bool:
    """Whether a stable hash puts this document aside: one in 25, whatever else there is."""
    data = key.encode(errors="surrogateescape")  # a file's name may be no text
    return int(hashlib.md5(data, usedforsecurity=False).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


class Source(ABC):
    """One thing that `--data` named."""

    name: str

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of one side of the split, in a fixed order."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON values that change when the text may have changed."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of text on both sides together."""


class OwnText(Source):
    """Text without a split of its own; see the rule at the top of this file."""

    @abstractmethod
    def everything(self) -> Iterator[Document]:
        """All documents in a fixed order."""

    @cached_property
    def _survey(self) -> tuple[int, int | None]:
        """Bytes in all, and where the tail begins that is held out; None if the hash decides."""
        total = hashed = 0
        with byte_bar("Reading", None) as advance:
            for document in self.everything():
                total += document.size
                hashed += document.size * held_out(document.key)
                advance(document.size)
        return total, None if 0.01 * total <= hashed <= 0.15 * total else int(total * (1 - HELD_OUT_TAIL))

    def size(self) -> int:
        return self._survey[0]

    def documents(self, split: Split) -> Iterator[Document]:
        total, border = self._survey
        valid = split == "valid"
        if border is None:
            yield from (document for document in self.everything() if held_out(document.key) == valid)
            return
        start = 0
        for document in self.everything():
            inside = border - start  # the border, counted from this document's beginning
            if 0 < inside < document.size:
                side = partial(_side, document, inside, (total - border) // 8, valid)
                yield Document(document.key, document.size - inside if valid else inside, side)
            elif (inside <= 0) == valid:
                yield document
            start += document.size


def _side(document: Document, border: int, slack: int, after: bool) -> Iterator[str]:
    """A document up to a byte, or from there on; the cut moves to the next line's beginning if one is near."""
    start = 0
    for piece in document.read():
        size = len(piece.encode())
        if start <= border < start + size:
            cut = len(piece.encode()[: border - start].decode(errors="ignore"))
            cut = piece.find("\n", cut, cut + slack) + 1 or cut
            piece = piece[cut:] if after else piece[:cut]
        elif (start > border) != after:
            piece = ""
        start += size
        if piece:
            yield piece
