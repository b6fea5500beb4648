"""Pictures and recordings of a corpus as arrays on disk, each distinct one once, memory-mapped when read.

What is kept is what the encoders take (`Medium.prepared`): scaled pixels, log-mel frames, or features from elsewhere.
Which conversation means which of them is in the tokens beside (`chat_shards.py`).
"""

# R rows of all media of a kind

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..modality.media import Medium, positions
from ..modality.settings import KINDS, Kind, SensesConfig
from . import store


@dataclass(frozen=True)
class MediaShards:
    """The media of a corpus by kind and number, from 1 on."""

    values: dict[Kind, np.ndarray]  # (R, …): rows of pixels, frames or features
    starts: dict[Kind, np.ndarray]  # medium i of a kind is values[starts[i - 1] : starts[i]]

    def __call__(self, kind: Kind, number: int) -> np.ndarray:
        """A medium as its encoder takes it; a picture is one row."""
        starts = self.starts[kind]
        assert 1 <= number < len(starts), (kind, number, len(starts))
        rows = np.asarray(self.values[kind][int(starts[number - 1]) : int(starts[number])])
        return rows[0] if rows.ndim == 4 else rows

    def count(self, kind: Kind) -> int:
        """How many distinct media of a kind there are."""
        return len(self.starts[kind]) - 1 if kind in self.starts else 0


class MediaWriter:
    """Media while they are written to a folder. Each is opened once, a bad one too."""

    def __init__(self, folder: Path, config: SensesConfig) -> None:
        self._folder, self._config = folder, config
        self._numbers: dict[str, tuple[int, int]] = {}  # key to number and positions
        self._bad: dict[str, str] = {}
        self._files: dict[Kind, IO[bytes]] = {}
        self._starts: dict[Kind, array[int]] = {}
        self._shapes: dict[Kind, tuple[list[int], str]] = {}
        self._digest = hashlib.sha256()
        self.states: list[list[Any]] = []

    def add(self, medium: Medium) -> tuple[int, int]:
        """The medium's number and its positions. Raises `ValueError` with the file's name and the reason."""
        if (known := self._numbers.get(medium.key)) is not None:
            return known
        if (reason := self._bad.get(medium.key)) is not None:
            raise ValueError(reason)
        self.states.append(medium.state)
        try:
            prepared = medium.prepared(self._config)
        except ValueError as error:
            self._bad[medium.key] = str(error)
            raise
        kind = medium.kind
        rows = prepared[None] if prepared.ndim == 3 else prepared
        if kind not in self._files:
            self._files[kind] = (self._folder / f"{kind}.values").open("wb")
            self._starts[kind] = array("q", [0])
            self._shapes[kind] = (list(rows.shape[1:]), str(rows.dtype))
        data = np.ascontiguousarray(rows).tobytes()
        self._files[kind].write(data)
        self._digest.update(kind.encode() + data)
        self._starts[kind].append(self._starts[kind][-1] + len(rows))
        found = (len(self._starts[kind]) - 1, positions(self._config, kind, prepared))
        self._numbers[medium.key] = found
        return found

    def release(self) -> None:
        """Close the files, whatever happened."""
        for file in self._files.values():
            file.close()

    def close(self) -> dict[str, Any]:
        """Everything on the disk; what meta.json says of it."""
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            (self._folder / f"{kind}.starts").write_bytes(self._starts[kind].tobytes())
        self.release()
        (self._folder / "media.json").write_text(json.dumps(self.states), encoding="utf-8")
        return {
            "kinds": {kind: [len(self._starts[kind]) - 1, *self._shapes[kind]] for kind in self._files},
            "rows": {kind: self._starts[kind][-1] for kind in self._files},
            "sha256": self._digest.hexdigest(),
        }


def open_media(folder: Path, meta: dict[str, Any]) -> MediaShards:
    """What a writer wrote. Raises `ValueError` when it is damaged, or when a file it was made of has changed."""
    for state in json.loads((folder / "media.json").read_text(encoding="utf-8")):
        _check_state(state)
    values, starts = {}, {}
    for kind in (kind for kind in KINDS if kind in meta["kinds"]):
        count, shape, dtype = meta["kinds"][kind]
        size = int(np.prod(shape)) * meta["rows"][kind]
        values[kind] = store.mapped(folder / f"{kind}.values", np.dtype(dtype), size).reshape(-1, *shape)
        starts[kind] = store.mapped(folder / f"{kind}.starts", np.dtype(np.int64), count + 1)
    return MediaShards(values, starts)


def _check_state(state: Sequence[Any]) -> None:
    kind, _, path = state[0].partition(" ")
    if len(state) > 1 and Medium(kind, path, Path(path)).state != list(state):
        raise ValueError(f"{path}: has changed")
