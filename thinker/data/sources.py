"""What `--data` may name: named sets, files and folders, and sets of the Hugging Face hub.

Here a value becomes a source of documents, or one line that says why not. The named sets themselves are in `named.py`,
what is held out of everything else in `split.py`, how files are read in `reading.py`. Tokens are no concern of this
room: `shards.py` makes them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..places import expand_home
from .digits import DIGIT_SETS
from .named import EVALUATION_SETS, TRAINING_SETS
from .questions import CHAT_SETS
from .reading import (
    NAME_CHATS,
    NO_DATA,
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    documents_of,
    file_state,
    files_below,
    row_documents,
    text_column,
)
from .split import OwnText, Source, Split


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
        refuse_conversations(value)
        if value in TRAINING_SETS:
            sources.append(TRAINING_SETS[value])
        elif (source := _hub_set(value)) is not None:
            sources.append(source)
        else:
            paths.append(value)
    if paths:
        sources.append(Files(paths))
    if not sources:
        raise ValueError(NO_DATA)
    return Sources(tuple(sources))


def open_evaluation(value: str) -> Iterator[Document]:
    """What to evaluate on: the held-out part of a named set or hub set, the whole of a file or folder."""
    refuse_conversations(value)
    named = TRAINING_SETS | EVALUATION_SETS
    source = named[value] if value in named else _hub_set(value)
    return source.documents("valid") if source is not None else Files([value]).everything()


def refuse_conversations(value: str) -> None:
    """Raise `ValueError` for a named set that is no text."""
    if value in CHAT_SETS or value in DIGIT_SETS:
        raise ValueError(f"{value}: holds conversations, no text: {NAME_CHATS}")


class Files(OwnText):
    """Files of any kind that is UTF-8 text, .jsonl and .parquet files, and folders of those."""

    def __init__(self, values: Sequence[str]) -> None:
        self.name = ", ".join(values)
        found: dict[Path, str] = {}  # path to key, each file once
        for value in values:
            if not value:  # a path of nothing would be the folder one is in
                raise ValueError(NO_DATA)
            path = expand_home(value)
            if path.is_dir():
                inside = files_below(path, TEXT_SUFFIXES | ROW_SUFFIXES)
                if not inside:
                    raise ValueError(f"{value}: no text in this folder: name its files, if they end unlike .txt or .py")
                for key, file in inside.items():
                    found.setdefault(file.resolve(), key)
            elif not path.exists():
                sets = ", ".join(TRAINING_SETS | EVALUATION_SETS)
                raise ValueError(f"{value}: no such file or folder, and no named set (these are {sets})")
            elif not path.is_file():  # a pipe, which is empty at the second reading
                raise ValueError(f"{value}: no regular file, and text is read more than once: save it in one first")
            elif path.stat().st_size == 0:
                raise ValueError(f"{value}: the file is empty")
            else:
                found.setdefault(path.resolve(), path.name)
        self._files = found

    def everything(self) -> Iterator[Document]:
        for path, key in self._files.items():
            yield from documents_of(path, key)

    def fingerprint(self) -> list[Any]:
        return [[str(path), key, *file_state(path)] for path, key in self._files.items()]


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
        return rows.select_columns([text_column(rows.column_names, self.name)])

    def everything(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows, 1):
            ((column, text),) = row.items()
            yield from row_documents(text, f"{self.name}, row {number}, column {column}")

    def fingerprint(self) -> list[Any]:
        return [self.name, len(self._rows), self._rows.info.dataset_size]
