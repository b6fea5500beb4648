"""Text to tokens on disk, once: two memory-mapped files, training and held out, in bounded memory whatever the size.

They are kept in the cache folder under a hash of what they were made from (sources, tokenizer, version of the format)
and are reused when that is unchanged. A tokenizer is trained here when none is given, on a sample of the training side.
Which text that is, `sources.py` says; how tokens are cut into batches, `batches.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from rich.console import Console

from ..places import cache_folder, expand_home
from ..tokenizer import KINDS, Tokenizer
from . import store
from .batches import Batches, Windows
from .progress import byte_bar
from .reading import Document, text_document
from .sources import Sources, open_sources
from .split import Split

SAMPLE_CHARACTERS = 16_000_000  # a tokenizer is trained on this much at least, if it is there, and at most twice that
BATCH_CHARACTERS = 1 << 21  # encoded at a time
BATCH_PIECES = 10_000  # and no more pieces than this, for they may be short
# Tokens a byte from which on a large vocabulary is told not to fit a text: one made for it needs about a quarter.
SPELLED = 0.6
LARGE_VOCABULARY = 1000  # a small one may have nothing but letters

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Text as tokens on disk: what to train on, and what is held out. Each document is bos text eos."""

    name: str
    fingerprint: str  # of the tokens: a run that goes on needs the same, wherever the text now lies
    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray  # (N,) uint16 or uint32, memory-mapped, read-only
    valid: np.ndarray
    train_documents: int
    valid_documents: int
    train_bytes: int  # of text, in UTF-8
    valid_bytes: int

    def valid_text(self) -> Iterator[bytes]:
        """The held-out text in UTF-8, in pieces, the documents one after the other with nothing between."""
        with (self.folder / "valid.txt").open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece

    def held_out(self) -> Iterator[Document]:
        """The held-out documents as they were when the tokens were made, whatever became of the files since."""
        starts = store.mapped(self.folder / "valid.starts", np.dtype(np.int64), self.valid_documents + 1)
        with (self.folder / "valid.txt").open("rb") as file:
            for number, size in enumerate(np.diff(starts).tolist(), 1):
                yield text_document(file.read(size).decode(), f"{self.name}, held out {number}")

    def batches(self, rows: int, ctx_len: int, seed: int, ramp: int = 0) -> Batches:
        """What to train on, `rows` windows at a time."""
        return Batches(self.train, rows, ctx_len, seed, ramp)

    def windows(self, ctx_len: int) -> Windows:
        """What is held out, in order."""
        return Windows(self.valid, ctx_len)

    @property
    def tokens_per_byte(self) -> float:
        """Of the held-out text: what turns a loss per token into one per byte."""
        return len(self.valid) / self.valid_bytes

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train):,} tokens ({self.train_bytes / 1e6:,.1f} MB) to train on, "
            f"{len(self.valid):,} ({self.valid_bytes / 1e6:,.1f} MB) held out, "
            f"{self.tokenizer.vocab_size:,} in the vocabulary"
        )


def prepare(
    data: Sequence[str],
    tokenizer: Tokenizer | str = "bpe",
    vocab_size: int = 5000,
    min_tokens: int = 2,
    say: Say = lambda line: None,
) -> Corpus:
    """The tokens of what `--data` named, made now or found in the cache.

    `tokenizer` is used as it is; or it says what kind to train with at most `vocab_size` tokens, bpe or char; or it is
    a tokenizer.json, to which the special tokens it lacks are appended. Raises `ValueError` if there are fewer than
    `min_tokens` tokens to train on, or fewer than two held out.
    """
    made_for_it = tokenizer in KINDS
    cache = cache_folder()
    with store.telling_of(cache):
        sources = open_sources(data)
        state = sources.fingerprint()
        tokenizer = tokenizer_for(sources, state, tokenizer, vocab_size, say)
        folder = cache / "shards" / store.key(state, tokenizer.to_json())
        corpus = _opened(sources.name, folder, tokenizer)
        if corpus is None:
            _build(sources, tokenizer, folder)
            corpus = _opened(sources.name, folder, tokenizer)
            assert corpus is not None, folder
    for tokens, needed, where in ((corpus.train, min_tokens, ""), (corpus.valid, 2, " for the held-out part")):
        if len(tokens) < needed:
            raise ValueError(
                f"{corpus.name}: {len(tokens):,} tokens found{where}, at least {needed:,} needed: "
                "give more text, or lower ctx_len"
            )
    say(str(corpus))
    spelled = (len(corpus.valid) - 2 * corpus.valid_documents) / max(corpus.valid_bytes, 1)
    if not made_for_it and spelled > SPELLED and corpus.tokenizer.vocab_size > LARGE_VOCABULARY:
        say(
            f"the tokenizer isn't made for this text: {spelled:.2f} tokens a byte, where one that is takes about 0.25; "
            "from nothing, without --init and --tokenizer, a new one is made"
        )
    return corpus


@dataclass(frozen=True)
class EncodedText:
    """Some of a corpus: the tokens, the pieces of text they are of, and whether a document ends with each."""

    tokens: np.ndarray  # (N,) uint32
    texts: list[str]
    ends: list[bool]


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Tokens of documents, in order and in bounded batches; a document is bos text eos."""
    batch: list[tuple[str, bool, bool]] = []
    pending = 0
    for marked in _marked_pieces(documents):
        batch.append(marked)
        pending += len(marked[0])
        if pending >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield _encoded_batch(batch, tokenizer)
            batch, pending = [], 0
    if batch:
        yield _encoded_batch(batch, tokenizer)


def _encoded_batch(batch: list[tuple[str, bool, bool]], tokenizer: Tokenizer) -> EncodedText:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id  # None in a tokenizer that has none: then nothing stands there
    texts = [text for text, _, _ in batch]
    parts: list[Any] = []
    for (_, begins, ends), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
        if begins and bos is not None:
            parts.append([bos])
        parts.append(ids)
        if ends and eos is not None:
            parts.append([eos])
    tokens = np.concatenate(parts, dtype=np.uint32, casting="unsafe")
    return EncodedText(tokens, texts, [ends for _, _, ends in batch])


def _marked_pieces(documents: Iterable[Document]) -> Iterator[tuple[str, bool, bool]]:
    """Every piece of text, whether it begins its document, and whether it ends it. Empty documents have none."""
    for document in documents:
        pieces = document.read()
        text, begins = next(pieces, None), True
        while text is not None:
            following = next(pieces, None)
            yield text, begins, following is None
            text, begins = following, False


class Texts(Protocol):
    """What a tokenizer can be trained on: the training side of text, or what is said in conversations."""

    @property
    def name(self) -> str: ...

    def documents(self, split: Split) -> Iterator[Document]: ...

    def size(self) -> int: ...


def tokenizer_for(texts: Texts, state: list[Any], wanted: Tokenizer | str, vocab_size: int, say: Say) -> Tokenizer:
    """The tokenizer itself, or the one to be trained or read that `wanted` says: see `prepare`. state: of the texts."""
    if isinstance(wanted, Tokenizer):
        return wanted
    if wanted not in KINDS:
        return Tokenizer.from_file(expand_home(wanted), complete=True)
    tokenizer = _trained(texts, state, wanted, vocab_size, cache_folder() / "tokenizers")
    if tokenizer.vocab_size < vocab_size:
        say(f"{texts.name}: the text yields {tokenizer.vocab_size:,} tokens, not the {vocab_size:,} allowed")
    return tokenizer


def _trained(sources: Texts, state: list[Any], kind: str, vocab_size: int, folder: Path) -> Tokenizer:
    """A tokenizer for these sources; it is kept in `folder` and found there again."""
    path = folder / f"{store.key(state, kind, vocab_size, tokenizers.__version__)}.json"
    if path.is_file():
        with suppress(ValueError):  # a damaged one is made again
            return Tokenizer.from_file(path)
    sample = _sample(sources)
    with Console(stderr=True).status(f"Training a tokenizer ({kind}, up to {vocab_size:,} tokens)"):
        tokenizer = Tokenizer.train(sample, vocab_size, kind)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        unfinished = Path(temporary) / path.name
        unfinished.write_text(tokenizer.to_json(), encoding="utf-8")
        unfinished.replace(path)
    return tokenizer


def _sample(sources: Texts) -> list[str]:
    """Pieces of the training side, evenly spread over it: all of a small corpus, every n-th piece of a large one."""
    kept: list[str] = []
    size, stride = 0, 1
    with byte_bar("Sampling", sources.size()) as advance:
        for number, (text, _, _) in enumerate(_marked_pieces(sources.documents("train"))):
            advance(len(text))
            if number % stride == 0:
                kept.append(text)
                size += len(text)
            if size > 2 * SAMPLE_CHARACTERS:
                kept, stride = kept[::2], 2 * stride
                size = sum(map(len, kept))
    return kept


def _build(sources: Sources, tokenizer: Tokenizer, folder: Path) -> None:
    """Write both sides, their files synced."""
    with store.whole_folder(folder) as unfinished:
        with byte_bar("Tokenizing", sources.size()) as advance:
            train = _write(sources, "train", tokenizer, unfinished, advance)
            valid = _write(sources, "valid", tokenizer, unfinished, advance)
        meta = {"name": sources.name, "train": train, "valid": valid}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _write(
    sources: Sources, split: Split, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], None]
) -> dict[str, int | str]:
    """One side's tokens, and the held-out side's text with them, and where in it each document begins.

    Returns what meta.json says of it.
    """
    dtype = store.token_dtype(tokenizer.vocab_size)
    tokens = size = 0
    starts = array("q", [0])
    digest = hashlib.sha256()
    keep_text = (folder / "valid.txt").open("wb") if split == "valid" else nullcontext()
    with (folder / f"{split}.bin").open("wb") as token_file, keep_text as text_file:
        for part in _encoded(sources.documents(split), tokenizer):
            data = part.tokens.astype(dtype).tobytes()
            token_file.write(data)
            digest.update(data)
            tokens += len(part.tokens)
            before = size
            for text, ends in zip(map(str.encode, part.texts), part.ends, strict=True):
                if text_file is not None:
                    text_file.write(text)
                size += len(text)
                if ends:
                    starts.append(size)
            advance(size - before)
        token_file.flush()
        os.fsync(token_file.fileno())
    if split == "valid":
        (folder / "valid.starts").write_bytes(starts.tobytes())
    return {"tokens": tokens, "documents": len(starts) - 1, "bytes": size, "sha256": digest.hexdigest()}


def _opened(name: str, folder: Path, tokenizer: Tokenizer) -> Corpus | None:
    """A corpus that is there and whole; what is damaged is removed, to be made again."""
    if not folder.is_dir():
        return None
    try:
        dtype = store.token_dtype(tokenizer.vocab_size)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        store.check_size(folder / "valid.txt", meta["valid"]["bytes"])
        store.check_size(folder / "valid.starts", 8 * (meta["valid"]["documents"] + 1))
        return Corpus(
            name=name,
            fingerprint=f"{meta['train']['sha256']} {meta['valid']['sha256']}",
            folder=folder,
            tokenizer=tokenizer,
            train=store.mapped(folder / "train.bin", dtype, meta["train"]["tokens"]),
            valid=store.mapped(folder / "valid.bin", dtype, meta["valid"]["tokens"]),
            train_documents=meta["train"]["documents"],
            valid_documents=meta["valid"]["documents"],
            train_bytes=meta["train"]["bytes"],
            valid_bytes=meta["valid"]["bytes"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder)
        return None
