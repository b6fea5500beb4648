"""Conversations to tokens on disk, once, in bounded memory; reused when data, tokenizer and template are unchanged.

For each side three or four memory-mapped arrays (`packing.Chats`), and beside them where each conversation stands in
the data and what was left out. Which conversations there are, `chats.py` says; how they are packed into rows,
`packing.py`; their pictures and sounds are in `media_shards.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
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
from ..messages import text_of
from ..modality.sequence import Expanded, expand, placeholder_ids
from ..modality.settings import Kind, NotInstalled, SensesConfig
from ..places import cache_folder
from ..tokenizer import Tokenizer
from . import store
from .chats import ChatSources, Conversation, Skipped, Tally, counted, listed, open_chats
from .media_shards import MediaShards, MediaWriter, open_media
from .packing import Chats, PackedBatches, PackedRows
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
    media: MediaShards | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return self.chat_format.tokenizer

    def batches(self, rows: int, ctx_len: int, seed: int, ramp: int = 0) -> PackedBatches:
        """What to train on, `rows` packed rows at a time."""
        return PackedBatches(self.train, rows, ctx_len, seed, ramp)

    def windows(self, ctx_len: int) -> PackedRows:
        """What is held out, packed."""
        return PackedRows(self.valid, ctx_len)

    def too_long(self, ctx_len: int) -> list[str]:
        """Where the conversations stand that don't fit into the context."""
        return self._where("train", self.train.places > ctx_len) + self._where("valid", self.valid.places > ctx_len)

    def held_out(self, ctx_len: int) -> list[str]:
        """Where the held-out conversations stand that fit into the context."""
        return self._where("valid", self.valid.places <= ctx_len)

    def _where(self, split: Split, chosen: np.ndarray) -> list[str]:
        if not chosen.any():
            return []
        lines = (self.folder / f"{split}.where").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return list(itertools.compress(lines, chosen.tolist()))

    def __str__(self) -> str:
        sides = ", ".join(
            f"{counted(len(chats), 'conversation')} ({int(chats.said.sum()):,} of {len(chats.tokens):,} tokens are the "
            f"assistant's) {what}"
            for chats, what in ((self.train, "to train on"), (self.valid, "held out"))
        )
        about = ""
        if self.media is not None:
            about = (
                f", {counted(self.media.count('image'), 'picture')} and {counted(self.media.count('audio'), 'sound')}"
            )
        return f"{self.name}: {sides}, {self.tokenizer.vocab_size:,} in the vocabulary{about}"


def prepare_chats(
    data: Sequence[str],
    tokenizer: Tokenizer | str,
    make_format: MakeFormat,
    ctx_len: int,
    vocab_size: int = 5000,
    say: Say = lambda line: None,
    senses: SensesConfig | None = None,
    strict_media: bool = False,
) -> ChatCorpus:
    """The tokens of the conversations that `--data` named, made now or found in the cache.

    `tokenizer` is as for `shards.prepare`; `make_format` says how it writes conversations. What is left out is said,
    each reason in a line; so are conversations with a picture or sound that can't be used, unless `strict_media` makes
    the first of them an error. `senses` says how pictures and sounds are prepared. Raises `ValueError` for data that
    can't be read, and when nothing is left.
    """
    cache = cache_folder()
    with store.telling_of(cache):
        sources = open_chats(data)
        state = sources.fingerprint()
        tokenizer = tokenizer_for(sources, state, tokenizer, vocab_size, say)
        chat_format = make_format(tokenizer)
        how: list[Any] = [chat_format.source, chat_format.bos_token, chat_format.eos_token]
        if senses is not None:
            how += [senses.preparation(), strict_media]
        folder = cache / "chats" / store.key(state, tokenizer.to_json(), how)
        corpus = _opened(sources.name, folder, chat_format)
        if corpus is None:
            _build(sources, chat_format, folder, senses, strict_media)
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

    def __init__(self, folder: Path, split: Split, dtype: np.dtype, with_media: bool) -> None:
        self._dtype = dtype
        kinds = ("tokens", "said", "where", *(("media",) if with_media else ()))
        self._files = [(folder / f"{split}.{kind}").open("wb") for kind in kinds]
        self._starts_path = folder / f"{split}.starts"
        self._starts = array("q", [0])
        self._digest = hashlib.sha256()
        self.reply_bytes = self.reply_tokens = 0

    def add(self, conversation: Conversation, row: Expanded, said: np.ndarray) -> None:
        where = conversation.where.encode(errors="surrogateescape")  # a file's name may be no text
        data = [row.ids.astype(self._dtype).tobytes(), said.tobytes(), where + b"\n"]
        data.append(row.media.tobytes())
        for file, one in zip(self._files, data, strict=False):  # the last only where there are media
            file.write(one)
        self._digest.update(data[0] + data[1])
        self._starts.append(self._starts[-1] + len(row.ids))
        self.reply_tokens += int(said.sum())
        replies = (message["content"] for message in conversation.messages if message["role"] == "assistant")
        self.reply_bytes += sum(len(text_of(reply).encode()) for reply in replies)

    def release(self) -> None:
        """Close the files, whatever happened."""
        for file in self._files:
            file.close()

    def close(self) -> dict[str, Any]:
        """Everything on the disk; what meta.json says of it."""
        self._starts_path.write_bytes(self._starts.tobytes())
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.release()
        return {
            "tokens": self._starts[-1],
            "conversations": len(self._starts) - 1,
            "reply_tokens": self.reply_tokens,
            "reply_bytes": self.reply_bytes,
            "sha256": self._digest.hexdigest(),
        }


def _build(
    sources: ChatSources, chat_format: ChatFormat, folder: Path, senses: SensesConfig | None, strict_media: bool
) -> None:
    dtype = store.token_dtype(chat_format.tokenizer.vocab_size)
    tally = Tally()
    with (
        store.whole_folder(folder) as unfinished,
        byte_bar("Tokenizing", sources.size()) as advance,
        contextlib.ExitStack() as opened,
    ):
        sides = {split: _Side(unfinished, split, dtype, senses is not None) for split in SPLITS}
        writer = None if senses is None else MediaWriter(unfinished, senses)
        for side in sides.values():
            opened.callback(side.release)
        if writer is not None:
            opened.callback(writer.release)
        for item in sources.sides():
            if isinstance(item, Skipped):
                tally.add(item)
                continue
            split, conversation = item
            advance(conversation.size)
            try:
                numbered = _media(conversation, writer)
            except NotInstalled:  # with the package it would be another corpus
                raise
            except ValueError as error:
                if strict_media:
                    raise ValueError(f"{conversation.where}: {error}") from None
                tally.add(Skipped(f"{conversation.where}: {error}", "with a picture or sound that can't be used"))
                continue
            try:
                ids, said = chat_format.encode_for_training(conversation.messages)
            except ValueError as error:
                tally.add(Skipped(conversation.where, f"that can't be written in this model's way ({error})"))
                continue
            if not any(said[1:]):
                tally.add(Skipped(conversation.where, "whose assistant says nothing"))
                continue
            if numbered:
                row = expand(
                    ids, [(kind, count) for kind, _, count in numbered], placeholder_ids(chat_format.tokenizer)
                )
                number_of = np.array([0, *(number for _, number, _ in numbered)], np.int32)
                row = dataclasses.replace(row, media=number_of[row.media])
            else:
                row = Expanded(np.array(ids, np.int64), np.zeros(len(ids), np.int32), np.arange(len(ids)))
            sides[split].add(conversation, row, np.array(said, bool)[row.source])
        meta = {split: side.close() for split, side in sides.items()} | asdict(tally)
        meta["media"] = None if writer is None else writer.close()
        (unfinished / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _media(conversation: Conversation, writer: MediaWriter | None) -> list[tuple[Kind, int, int]]:
    """Kind, number and positions of each picture and sound. Raises `ValueError` for one that can't be used."""
    media = conversation.media
    if media and writer is None:
        raise ValueError(f"{media[0].name}: this model takes no pictures and sounds")
    return [(medium.kind, *writer.add(medium)) for medium in media] if writer is not None else []


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
                media=None
                if meta["media"] is None
                else store.mapped(folder / f"{split}.media", np.dtype(np.int32), tokens),
            )
        with_media = meta["media"] is not None
        return ChatCorpus(
            name=name,
            fingerprint=" ".join(meta[part]["sha256"] for part in (*SPLITS, *(("media",) if with_media else ()))),
            folder=folder,
            chat_format=chat_format,
            train=sides["train"],
            valid=sides["valid"],
            tokens_per_byte=meta["valid"]["reply_tokens"] / max(meta["valid"]["reply_bytes"], 1),
            tally=Tally(meta["places"]),
            media=open_media(folder, meta["media"]) if with_media else None,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder)
        return None
