"""Prompts with pictures and sounds: messages to the embeddings that any decoder can begin with.

`Reader` belongs to one model with encoders. What it has made of a file is kept, so that a conversation pays for it
once. It needs torch, and is imported when the first picture or sound comes; decoding goes on wherever it did.
"""

# T positions of the prompt, N of one medium, D d_model, V vocabulary

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .chat import ChatFormat
from .formats import Modality, Q8Tensor
from .messages import Message, Part, media_parts
from .modality.media import Medium, attachment, medium_of
from .modality.senses import Senses
from .modality.sequence import PLACEHOLDERS, Expanded, expand, placeholder_ids, splice
from .modality.settings import Kind
from .parameters import load_parameters

KEPT = 64  # media whose embeddings are kept
_MARKERS: dict[str, Kind] = {marker: kind for kind, marker in PLACEHOLDERS.items()}

Attachable = str | Path | Part


class Reader:
    """What a model with senses makes of messages. `table` is its embedding (V, D)."""

    def __init__(self, modality: Modality, table: np.ndarray | Q8Tensor, chat_format: ChatFormat, where: str) -> None:
        self._table, self._format = np.asarray(table, np.float32), chat_format
        self._placeholders = placeholder_ids(chat_format.tokenizer)
        self.senses = Senses(modality.config, self._table.shape[1]).eval()
        load_parameters(self.senses, modality.tensors, where)
        self._kept: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()

    def length(self, messages: Sequence[Message]) -> int:
        """How many positions the prompt takes."""
        return len(self._expanded(messages)[0].ids)

    def prompt(self, messages: Sequence[Message]) -> tuple[np.ndarray, tuple[int, ...]]:
        """The prompt's embeddings float32 (T, D), and what each stands for: see `generate.Request`.

        Raises `ValueError` with the file's name for a medium that can't be used.
        """
        row, made = self._expanded(messages)
        stands_for = row.ids.copy()
        for number, (features, digest) in enumerate(made, start=1):
            # Told apart by content and place within it, so that no picture goes on from another's keys and values.
            stands_for[row.media == number] = -2 - digest - np.arange(len(features))
        features = np.concatenate([features for features, _ in made])
        embeddings = splice(self._table[row.ids], row.media > 0, features)
        return embeddings, tuple(stands_for.tolist())

    def _expanded(self, messages: Sequence[Message]) -> tuple[Expanded, list[tuple[np.ndarray, int]]]:
        ids = self._format.encode(messages)
        media = [medium_of(part) for message in messages for part in media_parts(message["content"])]
        made = [self._embedded(medium) for medium in media]
        given = [(medium.kind, len(one[0])) for medium, one in zip(media, made, strict=True)]
        return expand(ids, given, self._placeholders), made

    @torch.inference_mode()
    def _embedded(self, medium: Medium) -> tuple[np.ndarray, int]:
        """A medium's embeddings (N, D), and a number that goes with its content."""
        key = repr(medium.state)
        if key not in self._kept:
            prepared = medium.prepared(self.senses.config)
            digest = hashlib.sha256(medium.kind.encode() + np.ascontiguousarray(prepared).tobytes()).digest()
            features = self.senses.of(medium.kind)([prepared]).float().numpy()
            # A file that is gone by the next message is what it was, so that a conversation can go on.
            self._kept[key] = self._kept[repr(medium.gone)] = (features, int.from_bytes(digest[:5]) << 16)
            while len(self._kept) > 2 * KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def as_parts(attach: Sequence[Attachable]) -> list[Part]:
    """Files, or parts of messages, as parts. Raises `ValueError` for what is neither a picture nor a sound."""
    if isinstance(attach, str | Path | Mapping):
        raise ValueError(f"attach is {attach!r}: give a list of files")
    if odd := [one for one in attach if not isinstance(one, str | Path | Mapping)]:
        raise ValueError(f"attach holds {odd[0]!r:.80}: give a list of files")
    return [one if isinstance(one, Mapping) else attachment(one) for one in attach]


def question(text: str, attach: Sequence[Attachable]) -> Message:
    """A user's message of attachments and text: where the text has `<|image|>` or `<|audio|>`, else in front of it.

    Raises `ValueError` with both numbers when these are not as many as the attachments of their kind.
    """
    parts = as_parts(attach)
    pieces = re.split(f"({'|'.join(map(re.escape, _MARKERS))})", text)
    markers = [_MARKERS[piece] for piece in pieces[1::2]]
    if not markers:
        return {"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}
    for kind, marker in PLACEHOLDERS.items():
        have, need = sum(part["type"] == kind for part in parts), markers.count(kind)
        if have != need:
            raise ValueError(f"{have} attachments of {kind} for {need} placeholders {marker}: give one each")
    waiting = {kind: [part for part in parts if part["type"] == kind] for kind in PLACEHOLDERS}
    content: list[Part] = []
    for piece in pieces:
        if piece in _MARKERS:
            content.append(waiting[_MARKERS[piece]].pop(0))
        elif piece:
            content.append({"type": "text", "text": piece})
    return {"role": "user", "content": content}
