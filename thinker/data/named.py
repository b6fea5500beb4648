"""The named sets: this Python's standard library, and public texts known by address, length and checksum.

A set says itself what is held out of it. A public text is looked for in THINKER_DATA, then in the cache, then
downloaded to there. Files, folders and sets of the hub, which have names too, are no concern of this room.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..places import cache_folder, expand_home
from .progress import byte_bar
from .reading import Document, documents_of, file_state, files_below, text_document
from .split import Source, Split, held_out


class StandardLibrary(Source):
    """The source of this Python's standard library, without its tests and IDLE. One file in 25 is held out by hash."""

    name = "stdlib"
    _skip = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})

    @cached_property
    def _files(self) -> dict[str, Path]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = files_below(folder, frozenset({".py"}), self._skip)
        if len(files) < 100:
            raise ValueError(f"stdlib: {folder} holds {len(files)} source files, too few: name other data with --data")
        return files

    def documents(self, split: Split) -> Iterator[Document]:
        for key, path in self._files.items():
            if held_out(key) == (split == "valid"):
                yield from documents_of(path, key)

    def fingerprint(self) -> list[Any]:
        return [self.name, *([key, *file_state(path)] for key, path in self._files.items())]

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
                yield text_document(part, f"{self.name} {number}")

    def fingerprint(self) -> list[Any]:
        return [self.name, self.sha256]

    def size(self) -> int:
        return self.length

    def locate(self) -> Path:
        """The verified file: in THINKER_DATA, else in the cache, else downloaded there."""
        places = [cache_folder() / "sets" / self.file]
        if folder := os.environ.get("THINKER_DATA"):
            places.insert(0, expand_home(folder) / self.file)
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
