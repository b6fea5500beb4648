"""Files that are either whole or not there: atomic replacement, synced to the disk, and JSON read strictly.

A file is written beside its place under a temporary name, synced, and renamed; a kill at any moment leaves the old file
or the new one. What the files mean lives elsewhere.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A temporary name that nobody has written to for an hour belongs to a process that was killed.
LEFTOVER_SECONDS = 3600.0
TEMPORARY = f".*.{8 * '[0-9a-f]'}.tmp"  # our own names alone: the folder may be one that people keep theirs in


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside `path`, which no reader takes for a finished file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # as TEMPORARY has it


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before going on."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and keeps their names by itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; when the block ends well, the file there replaces `path` atomically."""
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file atomically. NaN and infinity, which JSON lacks, raise `ValueError`."""
    write_text(path, _dumped(value) + "\n")


def to_json(value: dict[str, Any]) -> str:
    """A report as JSON that every program reads: NaN and infinity, which JSON lacks, are null in it."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return _dumped(plain)


def read_text(path: Path) -> str:
    """A UTF-8 file, or a `ValueError` that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, read as strictly as `parse_json` does."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """One JSON object. Keys given twice, NaN, infinity and anything but an object raise `ValueError` naming `where`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def brief(value: object, limit: int = 60) -> str:
    """The beginning of whatever a file from elsewhere holds, on one line, for a message about it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)[:limit])


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left under temporary names."""
    for path in folder.glob(TEMPORARY):
        try:
            abandoned = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
        except FileNotFoundError:  # its process has just finished
            continue
        if abandoned and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif abandoned:
            path.unlink(missing_ok=True)


def _dumped(value: dict[str, Any]) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # The name of a file may be no text. Bytes that are none are half surrogate pairs, whose escape is JSON's too.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"key {name[:80]!r} stands twice")
        values[name] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
