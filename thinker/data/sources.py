"""Where text comes from: what `--data` may name, read as documents, and which of them are held out.

Named sets, files and folders, and sets of the Hugging Face hub, all streamed in pieces of bounded size. What is held
out for validation:
- a named set has its own rule, documented with it;
- of everything else, one document in 25 by a stable hash (of a file's path within its folder, or of a row's text), as
  long as that is 1 to 15 % of the bytes; otherwise (one big file, a few files) the last 5 % of the bytes, from a line's
  beginning. A file is one document, and so is each row of a .jsonl or .parquet file.

Tokens are no concern of this room: `shards.py` makes them.
"""

from __future__ import annotations

import codecs
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Split = Literal["train", "valid"]

PIECE = 1 << 18  # bytes read, and characters handed on, at a time
HELD_OUT_ONE_IN = 25
HELD_OUT_TAIL = 0.05
_SUFFIXES = """
    .txt .md .rst .tex .org .adoc .py .pyi .c .h .cc .cpp .cxx .hpp .cu .rs .go .java .kt .scala .swift .cs .js .jsx
    .mjs .ts .tsx .html .css .php .rb .pl .lua .r .jl .hs .ml .ex .erl .clj .lisp .el .sh .sql .f90 .zig .nim .dart
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())  # what a folder is searched for; a file that is named may end otherwise
ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})
TEXT_FIELDS = ("text", "content")


def cache_folder() -> Path:
    """Where downloads and token shards are kept: THINKER_CACHE, or a folder of the user's cache."""
    if chosen := os.environ.get("THINKER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "thinker"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "thinker"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinker"


@contextmanager
def byte_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown once the work has taken a second; yields a function that adds bytes."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    task = progress.add_task(title, total=total)
    began = time.monotonic()

    def advance(count: int) -> None:
        progress.update(task, advance=count)
        if not progress.live.is_started and time.monotonic() - began > 1:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def held_out(key: str) -> bool:
    """Whether a stable hash puts this document aside: one in 25, whatever else there is."""
    data = key.encode(errors="surrogateescape")  # a file's name may be no text
    return int(hashlib.md5(data, usedforsecurity=False).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Document:
    """One text; `read` gives it in pieces of bounded size, `size` is its length in bytes, `key` what is hashed."""

    key: str
    size: int
    read: Callable[[], Iterator[str]]


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


@dataclass(frozen=True)
class Sources:
    """Everything that `--data` named: sets in the order given, then all files and folders."""

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def documents(self, split: Split) -> Iterator[Document]:
        return itertools.chain.from_iterable(source.documents(split) for source in self.sources)

    def fingerprint(self) -> list[Any]:
        return [source.fingerprint() for source in self.sources]

    def size(self) -> int:
        return sum(source.size() for source in self.sources)


def open_sources(values: Sequence[str]) -> Sources:
    """What to train on. A value is a named set, else a file or folder, else `owner/name` on the Hugging Face hub.

    All files and folders together are one source. Raises `ValueError` for what can't be found or holds no text.
    """
    sources: list[Source] = []
    paths: list[str] = []
    for value in dict.fromkeys(values):
        if value in EVALUATION_SETS:
            raise ValueError(f"{value}: for thinker eval only; to train, choose among {', '.join(TRAINING_SETS)}")
        if value in TRAINING_SETS:
            sources.append(TRAINING_SETS[value])
        elif (source := _hub_set(value)) is not None:
            sources.append(source)
        else:
            paths.append(value)
    if paths:
        sources.append(Files(paths))
    if not sources:
        raise ValueError("no data: name a set, a file or a folder")
    return Sources(tuple(sources))


def open_evaluation(value: str) -> Iterator[Document]:
    """What to evaluate on: the held-out part of a named set or hub set, the whole of a file or folder."""
    named = TRAINING_SETS | EVALUATION_SETS
    source = named[value] if value in named else _hub_set(value)
    return source.documents("valid") if source is not None else Files([value]).everything()


# Reading


def _in_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most PIECE characters that end at a line's end where there is one."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE:
            border = _line_border(rest)
            yield rest[:border]
            rest = rest[border:]
    if rest:
        yield rest


def _line_border(text: str) -> int:
    """Where to cut off a piece. Runs of white space are kept whole, so that the tokens are those of the uncut text."""
    end = last = text.rfind("\n", PIECE // 2, PIECE)
    while end > 0 and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind("\n", PIECE // 2, end)
    return end + 1 or last + 1 or PIECE


def _text_document(text: str, key: str | None = None) -> Document:
    """A text that is in memory already. Raises `UnicodeEncodeError` for half a surrogate pair."""

    def read() -> Iterator[str]:
        return _in_pieces(text[start : start + PIECE] for start in range(0, len(text), PIECE))

    return Document(text if key is None else key, len(text.encode()), read)


def _file_document(path: Path, key: str) -> Document:
    return Document(key, path.stat().st_size, lambda: _in_pieces(_decoded(path)))


def _decoded(path: Path) -> Iterator[str]:
    """A UTF-8 file piece by piece, without a byte-order mark, line ends as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(PIECE)
                at += len(chunk)
                text = decoder.decode(chunk, final=not chunk)
                yield text.removeprefix("\ufeff") if at == len(chunk) else text
                if not chunk:
                    return
    except UnicodeDecodeError as error:
        place = at - len(error.object) + error.start
        byte = f"0x{error.object[error.start]:02x}"
        raise ValueError(f"{path}: not UTF-8 ({byte} at byte {place}): save it as UTF-8, or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _jsonl_rows(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            fields = list(row) if isinstance(row, dict) else []
            text = next((row[field] for field in TEXT_FIELDS if field in fields), None)
            if not isinstance(text, str):
                found = f"found {', '.join(fields)}" if fields else "found no fields"
                raise ValueError(f'{where}: needs a string under "text" or "content", {found}')
            yield from _row(text, where)


def _parquet_rows(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: .parquet needs pyarrow: pip install 'thinker[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _text_column(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        raise ValueError(f"{path}: column {column} holds {type(text).__name__}, not text")
                    yield from _row(text or "", f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as .parquet ({str(error).splitlines()[0]})") from None


def _text_column(columns: Sequence[str], where: str) -> str:
    found = next((field for field in TEXT_FIELDS if field in columns), None)
    if found is None:
        raise ValueError(f'{where}: needs a column "text" or "content", found {", ".join(columns)}')
    return found


def _row(text: str, where: str) -> Iterator[Document]:
    try:
        if text:
            yield _text_document(text)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a surrogate pair, which is no character: remove it") from None


# The user's own text


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


class Files(OwnText):
    """Files of any kind that is UTF-8 text, .jsonl and .parquet files, and folders of those."""

    def __init__(self, values: Sequence[str]) -> None:
        self.name = ", ".join(values)
        found: dict[Path, str] = {}  # path to key, each file once
        for value in values:
            path = Path(value).expanduser()
            if path.is_dir():
                inside = _files_below(path, TEXT_SUFFIXES | ROW_SUFFIXES)
                if not inside:
                    raise ValueError(f"{value}: no text in this folder: name its files, if they end unlike .txt or .py")
                for key, file in inside.items():
                    found.setdefault(file.resolve(), key)
            elif not path.exists():
                sets = ", ".join(TRAINING_SETS | EVALUATION_SETS)
                raise ValueError(f"{value}: no such file or folder, and no named set (these are {sets})")
            elif path.stat().st_size == 0:
                raise ValueError(f"{value}: the file is empty")
            else:
                found.setdefault(path.resolve(), path.name)
        self._files = found

    def everything(self) -> Iterator[Document]:
        for path, key in self._files.items():
            if path.suffix.lower() == ".jsonl":
                yield from _jsonl_rows(path)
            elif path.suffix.lower() == ".parquet":
                yield from _parquet_rows(path)
            else:
                yield _file_document(path, key)

    def fingerprint(self) -> list[Any]:
        return [[str(path), key, *_state(path)] for path, key in self._files.items()]


def _files_below(folder: Path, suffixes: frozenset[str], skip: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Non-empty files by their path within the folder, sorted; nothing hidden, nothing in folders named in `skip`."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in suffixes and path.is_file() and path.stat().st_size:
                found[path.relative_to(folder).parts] = path
    return {"/".join(parts): found[parts] for parts in sorted(found)}


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


# The Hugging Face hub


def _hub_set(value: str) -> HubSet | None:
    looks_like_one = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", value) is not None
    taken = Path(value).exists() or Path(value).suffix.lower() in TEXT_SUFFIXES | ROW_SUFFIXES
    return HubSet(value) if looks_like_one and not taken else None


class HubSet(OwnText):
    """The training split of `owner/name` or `owner/name:configuration`, kept on disk by the `datasets` library."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError(
                f"{self.name}: no such file or folder; if it is a set of the hub: pip install 'thinker[hub]'"
            ) from None
        owner_and_name, _, configuration = self.name.partition(":")
        try:
            rows = datasets.load_dataset(owner_and_name, configuration or None, split="train")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name}: cannot be had from the hub ({str(error).splitlines()[0]})") from None
        return rows.select_columns([_text_column(rows.column_names, self.name)])

    def everything(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows, 1):
            (text,) = row.values()
            yield from _row(text or "", f"{self.name}, row {number}")

    def fingerprint(self) -> list[Any]:
        return [self.name, len(self._rows), self._rows.info.dataset_size]


# Named sets


class StandardLibrary(Source):
    """The source of this Python's standard library, without its tests and IDLE. One file in 25 is held out by hash."""

    name = "stdlib"
    _skip = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})

    @cached_property
    def _files(self) -> dict[str, Path]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = _files_below(folder, frozenset({".py"}), self._skip)
        if len(files) < 100:
            raise ValueError(f"stdlib: {folder} holds {len(files)} source files, too few: name other data with --data")
        return files

    def documents(self, split: Split) -> Iterator[Document]:
        for key, path in self._files.items():
            if held_out(key) == (split == "valid"):
                yield _file_document(path, key)

    def fingerprint(self) -> list[Any]:
        return [self.name, *([key, *_state(path)] for key, path in self._files.items())]

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files.values())


@dataclass(frozen=True)
class NamedSet(Source):
    """A public text: the first `length` bytes at `url`, known by checksum, and how it is cut into the two sides."""

    name: str
    file: str  # its place below THINKER_DATA and below the cache
    url: str
    length: int
    sha256: str
    cut: Callable[[str], Iterator[tuple[Split, str]]]

    def documents(self, split: Split) -> Iterator[Document]:
        text = self.locate().read_text(encoding="utf-8")
        for number, (side, part) in enumerate(self.cut(text)):
            if side == split:
                yield _text_document(part, f"{self.name} {number}")

    def fingerprint(self) -> list[Any]:
        return [self.name, self.sha256]

    def size(self) -> int:
        return self.length

    def locate(self) -> Path:
        """The verified file: in THINKER_DATA, else in the cache, else downloaded there."""
        places = [cache_folder() / "sets" / self.file]
        if folder := os.environ.get("THINKER_DATA"):
            places.insert(0, Path(folder).expanduser() / self.file)
        for place in places:
            if place.is_file():
                if hashlib.sha256(place.read_bytes()).hexdigest() != self.sha256:
                    raise ValueError(f"{place}: not the {self.name} that is known by its checksum: remove the file")
                return place
        try:
            self._download(places[-1])
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{self.name}: not at {' nor at '.join(map(str, places))}, and the download failed ({error}): "
                f"put the file from {self.url} at one of these places"
            ) from None
        return places[-1]

    def _download(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(self.url, headers={"Range": f"bytes=0-{self.length - 1}"})
        with (
            tempfile.TemporaryDirectory(dir=place.parent) as folder,
            urllib.request.urlopen(request, timeout=30) as answer,
            byte_bar(f"Downloading {self.name}", self.length) as advance,
        ):
            partial_file = Path(folder) / place.name
            content = b""
            # A server may ignore the range and send everything: no more than the set is taken.
            while chunk := answer.read(min(1 << 16, self.length - len(content))):
                content += chunk
                advance(len(chunk))
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise OSError(f"{len(content)} bytes came that don't have the checksum of its {self.length}")
            partial_file.write_bytes(content)
            partial_file.replace(place)


def _nanogpt_split(text: str) -> Iterator[tuple[Split, str]]:
    """The first 90 % of the characters to train, the rest held out, as nanoGPT has it."""
    border = int(len(text) * 0.9)
    yield "train", text[:border]
    yield "valid", text[border:]


def _stories(text: str) -> Iterator[tuple[Split, str]]:
    """One document a story; one in 25 is held out by a hash of its text, so that a repeated one has one side."""
    for story in map(str.strip, text.split("<|endoftext|>")):
        if story:
            yield "valid" if held_out(story) else "train", story


def _all_held_out(text: str) -> Iterator[tuple[Split, str]]:
    yield "valid", text


TRAINING_SETS: dict[str, Source] = {
    "stdlib": StandardLibrary(),
    "tinyshakespeare": NamedSet(
        name="tinyshakespeare",
        file="tinyshakespeare/input.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        length=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        cut=_nanogpt_split,
    ),
    # "TinyStories" (arXiv 2305.07759), CDLA-Sharing-1.0: the first 2 MiB of its training split.
    "tinystories": NamedSet(
        name="tinystories",
        file="tinystories/tinystories_2M.txt",
        url="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-train.txt",
        length=2_097_152,
        sha256="5352b299dcb1a32898b2d779b145b5a05f3e1265953fd21c264c9f9f9c9ae33d",
        cut=_stories,
    ),
}
EVALUATION_SETS: dict[str, Source] = {
    # WikiText-2 (arXiv 1609.07843), CC BY-SA: spaced punctuation and <unk>, so a text from elsewhere to evaluate on.
    "wikitext2": NamedSet(
        name="wikitext2",
        file="wikitext2/valid.txt",
        url="https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/valid.txt",
        length=1_121_681,
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        cut=_all_held_out,
    ),
}
