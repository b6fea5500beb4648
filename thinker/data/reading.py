"""From files to documents: which files of a folder are text, and their text in pieces of bounded size.

A file is one document, and so is each row of a .jsonl or .parquet file. What isn't UTF-8 text is refused, with its
place. Which files are read, `sources.py` and `named.py` say; which documents are held out, `split.py`.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 18  # bytes read, and characters handed on, at a time
_SUFFIXES = """
    .txt .md .rst .tex .org .adoc .py .pyi .c .h .cc .cpp .cxx .hpp .cu .rs .go .java .kt .scala .swift .cs .js .jsx
    .mjs .ts .tsx .html .css .php .rb .pl .lua .r .jl .hs .ml .ex .erl .clj .lisp .el .sh .sql .f90 .zig .nim .dart
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())  # what a folder is searched for; a file that is named may end otherwise
ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})
TEXT_FIELDS = ("text", "content")
NO_DATA = "no data: name a set, a file or a folder"
NAME_CHATS = "name it with --data, and add --chat"  # to train and to evaluate, and for what stands under --text


@dataclass(frozen=True)
class Document:
    """One text; `read` gives it in pieces of bounded size, `size` is its length in bytes, `key` what is hashed."""

    key: str
    size: int
    read: Callable[[], Iterator[str]]


def files_below(folder: Path, suffixes: frozenset[str], skip: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Non-empty files by their path within the folder, sorted; nothing hidden, nothing in folders named in `skip`.

    What runs record of their steps is left out, for they may lie in the folder whose text they learn. Raises
    `ValueError` for what can't be looked into: a corpus without it would be another one.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = {}
    with readable(folder):
        for parent, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                if path.suffix.lower() in suffixes and path.is_file() and path.stat().st_size and not is_metrics(path):
                    found[path.relative_to(folder).parts] = path
    return {"/".join(parts): found[parts] for parts in sorted(found)}


def is_metrics(path: Path) -> bool:
    """Whether a file is what a run writes of its steps (`train/report.py`), from the first one on."""
    if path.name != "metrics.jsonl":
        return False
    with path.open("rb") as file:
        return file.read(9) == b'{"step": '


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system refuses inside the block becomes a `ValueError` of one line that says what can't be read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of the last change: what a fingerprint needs to notice another text."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def documents_of(path: Path, key: str) -> Iterator[Document]:
    """A file's rows if it is .jsonl or .parquet, which are their own keys; else the file as one document."""
    if path.suffix.lower() == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield Document(key, path.stat().st_size, lambda: _in_pieces(_decoded(path)))


def text_document(text: str, key: str | None = None) -> Document:
    """A text that is in memory already. Raises `UnicodeEncodeError` for half a surrogate pair."""

    def read() -> Iterator[str]:
        return _in_pieces(text[start : start + PIECE] for start in range(0, len(text), PIECE))

    return Document(text if key is None else key, len(text.encode()), read)


def row_documents(text: object, where: str) -> Iterator[Document]:
    """A row's text as its document; an empty one, or a null, is none. Raises `ValueError` for what is no text."""
    if text is None:
        return
    if not isinstance(text, str):
        raise ValueError(f"{where}: holds {type(text).__name__}, not text: make it a string, or leave the set out")
    try:
        if text:
            yield text_document(text)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a surrogate pair, which is no character: remove it") from None


def text_column(columns: Sequence[str], where: str) -> str:
    """The column that holds the text. Raises `ValueError` if there is none."""
    found = next((field for field in TEXT_FIELDS if field in columns), None)
    if found is None:
        raise ValueError(f'{where}: needs a column "text" or "content", found {", ".join(columns)}')
    return found


def _jsonl_rows(path: Path) -> Iterator[Document]:
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            fields = list(row) if isinstance(row, dict) else []
            if "messages" in fields and not {*TEXT_FIELDS} & {*fields}:
                raise ValueError(f"{where}: holds a conversation, no text: {NAME_CHATS}")
            text = next((row[field] for field in TEXT_FIELDS if field in fields), None)
            if not isinstance(text, str):
                found = f"found {', '.join(fields)}" if fields else "found no fields"
                raise ValueError(f'{where}: needs a string under "text" or "content", {found}')
            yield from row_documents(text, where)


def _parquet_rows(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: .parquet needs pyarrow: pip install 'thinker[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = text_column(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from row_documents(text, f"{path}, row {number}, column {column}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as .parquet ({str(error).splitlines()[0]})") from None


def _decoded(path: Path) -> Iterator[str]:
    """A UTF-8 file piece by piece, without a byte-order mark, line ends as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        with readable(path), path.open("rb") as file:
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
