"""Conversations to tokens on disk, once, in bounded memory; reused when data, tokenizer and template are unchanged.

For each side three memory-mapped arrays (`packing.Chats`), and beside them where each conversation stands in the data
and what was left out. Which conversations there are, `chats.py` says; how they are packed into rows, `packing.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..chat import ChatFormat
from ..tokenizer import Tokenizer
from . import store
from .chats import ChatSources, Conversation, Skipped, Tally, counted, listed, open_chats
from .packing import Chats, PackedBatches, PackedRows
from .places import cache_folder
from .progress import byte_bar
from .shards import tokenizer_for
from .split import Split

SPLITS: tuple[Split, ...] = ("train", "valid")

Say = Callable[[str], None]
MakeFormat = Callable[[Tokenizer], ChatFormat]


@dataclass(frozen=True)
class ChatCorpus:
    """Conversations as tokens on disk: what to train on, and what is held out."""

    name: str
    fingerprint: str  # of the tokens
    folder: Path
    chat_format: ChatFormat
    train: Chats
    valid: Chats
    tokens_per_byte: float  # of the held-out replies
    tally: Tally

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return self.chat_format.tokenizer

    def batches(self, rows: int, ctx_len: int, seed: int) -> PackedBatches:
        """What to train on, `rows` packed rows at a time."""
        return PackedBatches(self.train, rows, ctx_len, seed)

    def windows(self, ctx_len: int) -> PackedRows:
        """What is held out, packed."""
        return PackedRows(self.valid, ctx_len)

    def too_long(self, ctx_len: int) -> list[str]:
        """Where the conversations stand that don't fit into the context."""
        places = []
        for split, chats in zip(SPLITS, (self.train, self.valid), strict=True):
            if len(over := np.flatnonzero(chats.places > ctx_len)):
                lines = (self.folder / f"{split}.where").read_text(encoding="utf-8").splitlines()
                places += [lines[i] for i in over.tolist()]
        return places

    def __str__(self) -> str:
        sides = ", ".join(
            f"{counted(len(chats), 'conversation')} ({int(chats.said.sum()):,} of {len(chats.tokens):,} tokens are the "
            f"assistant's) {what}"
            for chats, what in ((self.train, "to train on"), (self.valid, "held out"))
        )
        return f"{self.name}: {sides}, {self.tokenizer.vocab_size:,} in the vocabulary"


def prepare_chats(
    data: Sequence[str],
    tokenizer: Tokenizer | str,
    make_format: MakeFormat,
    ctx_len: int,
    vocab_size: int = 5000,
    say: Say = lambda line: None,
) -> ChatCorpus:
    """The tokens of the conversations that `--data` named, made now or found in the cache.

    `tokenizer` is as for `shards.prepare`; `make_format` says how it writes conversations. What is left out is said,
    each reason in a line. Raises `ValueError` for data that can't be read, and when nothing is left.
    """
    cache = cache_folder()
    with store.telling_of(cache):
        sources = open_chats(data)
        state = sources.fingerprint()
        tokenizer = tokenizer_for(sources, state, tokenizer, vocab_size, say)
        chat_format = make_format(tokenizer)
        how = [chat_format.source, chat_format.bos_token, chat_format.eos_token]
        folder = cache / "chats" / store.key(state, tokenizer.to_json(), how)
        corpus = _opened(sources.name, folder, chat_format)
        if corpus is None:
            _build(sources, chat_format, folder)
            corpus = _opened(sources.name, folder, chat_format)
            assert corpus is not None, folder
    say(str(corpus))
    for line in corpus.tally.lines():
        say(line)
    if over := corpus.too_long(ctx_len):
        say(f"skipped {counted(len(over), 'conversation')} longer than ctx_len {ctx_len}: {listed(over)}")
    for chats, what in ((corpus.train, "to train on"), (corpus.valid, "to hold out")):
        if not (chats.places <= ctx_len).any():
            left_out = sum(map(len, corpus.tally.places.values())) + len(over)
            raise ValueError(
                f"{corpus.name}: no conversation is left {what}, with {left_out:,} skipped: "
                f"give more that end within ctx_len {ctx_len} and have an assistant turn"
            )
    return corpus


class _Side:
    """One side of the split while it is written."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._files = [(folder / f"{split}.{kind}").open("wb") for kind in ("tokens", "said", "where")]
        self._starts_path = folder / f"{split}.starts"
        self._starts = array("q", [0])
        self._digest = hashlib.sha256()
        self.reply_bytes = self.reply_tokens = 0

    def add(self, conversation: Conversation, ids: list[int], said: list[bool]) -> None:
        tokens, said_bytes = np.array(ids, self._dtype).tobytes(), bytes(said)
        for file, data in zip(self._files, (tokens, said_bytes, conversation.where.encode() + b"\n"), strict=True):
            file.write(data)
        self._digest.update(tokens + said_bytes)
        self._starts.append(self._starts[-1] + len(ids))
        self.reply_tokens += sum(said)
        replies = (message["content"] for message in conversation.messages if message["role"] == "assistant")
        self.reply_bytes += sum(len(reply.encode()) for reply in replies)

    def close(self) -> dict[str, Any]:
        """Everything on the disk; what meta.json says of it."""
        self._starts_path.write_bytes(self._starts.tobytes())
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {
            "tokens": self._starts[-1],
            "conversations": len(self._starts) - 1,
            "reply_tokens": self.reply_tokens,
            "reply_bytes": self.reply_bytes,
            "sha256": self._digest.hexdigest(),
        }


def _build(sources: ChatSources, chat_format: ChatFormat, folder: Path) -> None:
    dtype = store.token_dtype(chat_format.tokenizer.vocab_size)
    tally = Tally()
    with store.whole_folder(folder) as unfinished, byte_bar("Tokenizing", sources.size()) as advance:
        sides = {split: _Side(unfinished, split, dtype) for split in SPLITS}
        for item in sources.sides():
            if isinstance(item, Skipped):
                tally.add(item)
                continue
            split, conversation = item
            advance(conversation.size)
            try:
                ids, said = chat_format.encode_for_training(conversation.messages)
            except ValueError as error:
                tally.add(Skipped(conversation.where, f"that can't be written in this model's way ({error})"))
                continue
            if any(said[1:]):
                sides[split].add(conversation, ids, said)
            else:
                tally.add(Skipped(conversation.where, "whose assistant says nothing"))
        meta = {split: side.close() for split, side in sides.items()} | asdict(tally)
        (unfinished / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _opened(name: str, folder: Path, chat_format: ChatFormat) -> ChatCorpus | None:
    """A corpus that is there and whole; what is damaged is removed, to be made again."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = store.token_dtype(chat_format.tokenizer.vocab_size)
        sides = {}
        for split in SPLITS:
            tokens, count = meta[split]["tokens"], meta[split]["conversations"]
            sides[split] = Chats(
                tokens=store.mapped(folder / f"{split}.tokens", dtype, tokens),
                said=store.mapped(folder / f"{split}.said", np.dtype(bool), tokens),
                starts=store.mapped(folder / f"{split}.starts", np.dtype(np.int64), count + 1),
            )
        return ChatCorpus(
            name=name,
            fingerprint=f"{meta['train']['sha256']} {meta['valid']['sha256']}",
            folder=folder,
            chat_format=chat_format,
            train=sides["train"],
            valid=sides["valid"],
            tokens_per_byte=meta["valid"]["reply_tokens"] / max(meta["valid"]["reply_bytes"], 1),
            tally=Tally(meta["places"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder)
        return None
