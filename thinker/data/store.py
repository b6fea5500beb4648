"""Arrays kept on disk: named by what they were made from, there whole or not at all, memory-mapped when read.

What is kept, and when it is made again, is the business of `shards.py` (text) and `chat_shards.py` (conversations).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 2  # part of every key: raise it when the same text would give other files


def key(*parts: Any) -> str:
    """A name for what was made from these JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside the final place and renamed to it at the end: it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.glob("unfinished-*"):  # what a killed process left behind
        try:
            abandoned = time.time() - path.stat().st_mtime > 86_400
        except FileNotFoundError:  # its process has just finished
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process made the same meanwhile, and its folder is as good.


@contextmanager
def telling_of(cache: Path) -> Iterator[None]:
    """What the system refuses inside the block becomes a `ValueError` of one line that says where tokens are kept."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or cache}: {error.strerror or error} (tokens are kept in {cache}; "
            "set THINKER_CACHE to have them elsewhere)"
        ) from None


def mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` values of a file, read-only. Raises `ValueError` when the file has another size."""
    check_size(path, count * dtype.itemsize)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


def check_size(path: Path, expected: int) -> None:
    """Raise `ValueError` unless the file has this many bytes."""
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes where {expected} were written")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
