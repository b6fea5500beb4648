"""Named sets of pictures and sounds of digits: `digits`, `fsdd`, and `digit-sums`, which needs both.

The pictures are scikit-learn's, the recordings the Free Spoken Digit Dataset's. Both are unpacked into the cache as
files that anybody can open; conversations about them are made here. What is held out: every fifth picture, and of each
speaker and digit the recordings 0 to 4, the official test split. `fsdd:theo` holds out everything that Theo says.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..messages import Message, Part
from ..places import cache_folder, expand_home
from . import store
from .progress import byte_bar
from .split import Split

VERSION = 4  # part of every fingerprint: raise it when other conversations are made
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUMS: dict[Split, int] = {"train": 4_000, "valid": 600}
FACTS = 12  # times that each fact about two digits stands in digit-sums, as text alone
SIDES: tuple[Split, ...] = ("train", "valid")
QUESTIONS = ("sum?", "same?", "larger?")

FSDD_COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
FSDD_FILE = "fsdd/fsdd_26eb9aa.tar.gz"
FSDD_URL = f"https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/{FSDD_COMMIT}"
# Of all names and bytes of the recordings in order: how an archive was packed makes no difference.
FSDD_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"
FSDD_RECORDINGS = 3000
LARGEST_DOWNLOAD = 1 << 26


@dataclass(frozen=True)
class Example:
    """One file of a digit, and which digit it is."""

    path: Path
    digit: int
    split: Split

    @property
    def part(self) -> Part:
        """As a part of a message."""
        kind = "image" if self.path.suffix == ".png" else "audio"
        return {"type": kind, kind: str(self.path)}


def pictures() -> list[Example]:
    """The 1,797 pictures, unpacked when first asked for. Raises `ValueError` without scikit-learn or Pillow."""
    try:
        import PIL.Image
        import sklearn.datasets
    except ImportError as error:
        raise ValueError(f"digits: needs {error.name}: pip install 'thinker[senses]'") from None
    data = sklearn.datasets.load_digits()
    folder = cache_folder() / "sets" / "digits-8x8"
    with store.telling_of(cache_folder()):
        if not folder.is_dir():
            with store.whole_folder(folder) as unfinished:
                for number, (image, digit) in enumerate(zip(data.images, data.target, strict=True)):
                    # 0 to 16, ink on paper: dark on light in a file, as anybody would scan it.
                    pixels = 255 - np.clip(image * 255 / 16, 0, 255).astype(np.uint8)
                    PIL.Image.fromarray(pixels).save(unfinished / f"{number:04d}_{digit}.png")
    return [
        Example(folder / f"{number:04d}_{digit}.png", int(digit), "valid" if number % 5 == 4 else "train")
        for number, digit in enumerate(data.target.tolist())
    ]


def recordings(held_out_speaker: str | None = None) -> list[Example]:
    """The 3,000 recordings, fetched and unpacked when first asked for. Raises `ValueError` where they can't be had."""
    folder = cache_folder() / "sets" / f"fsdd-{FSDD_COMMIT[:7]}"
    with store.telling_of(cache_folder()):
        if not folder.is_dir():
            content = _recordings_in(_fetched())
            with store.whole_folder(folder) as unfinished:
                for name, data in content.items():
                    (unfinished / name).write_bytes(data)
    found = []
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, index = path.stem.split("_")
        aside = int(index) < 5 if held_out_speaker is None else speaker == held_out_speaker
        found.append(Example(path, int(digit), "valid" if aside else "train"))
    return found


def _fetched() -> bytes:
    """The archive: in THINKER_DATA, else in the cache, else downloaded; it isn't kept, its recordings are."""
    places = [cache_folder() / "sets" / FSDD_FILE]
    if folder := os.environ.get("THINKER_DATA"):
        places.insert(0, expand_home(folder) / FSDD_FILE)
    if found := next((place for place in places if place.is_file()), None):
        return found.read_bytes()
    try:
        with urllib.request.urlopen(FSDD_URL, timeout=30) as answer, byte_bar("Downloading fsdd", None) as advance:
            content = b""
            while (chunk := answer.read(1 << 16)) and len(content) < LARGEST_DOWNLOAD:
                content += chunk
                advance(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"fsdd: not at {' nor at '.join(map(str, places))}, and the download failed ({error}): "
            f"put the archive from {FSDD_URL} at one of these places"
        ) from None
    return content


def _recordings_in(archive: bytes) -> dict[str, bytes]:
    """Names and bytes of the recordings. Raises `ValueError` unless they are exactly the known ones."""
    content = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
            for member in packed:
                place = Path(member.name)
                if member.isfile() and place.parent.name == "recordings" and place.suffix == ".wav":
                    file = packed.extractfile(member)
                    assert file is not None
                    content[place.name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"fsdd: its archive is damaged ({error}): remove {FSDD_FILE}") from None
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(name.encode() + content[name])
    if digest.hexdigest() != FSDD_SHA256:
        raise ValueError(
            f"fsdd: {len(content):,} recordings that don't have the checksum of the {FSDD_RECORDINGS:,}: "
            f"remove {FSDD_FILE}"
        )
    return content


class DigitSet:
    """One of the three sets: conversations of one question and one answer, each on its side of the split."""

    def __init__(self, name: str, speaker: str | None = None) -> None:
        self.name = name if speaker is None else f"{name}:{speaker}"
        self._kind, self._speaker = name, speaker

    def fingerprint(self) -> list[Any]:
        """JSON values that change when the conversations do."""
        return [self.name, VERSION, SUMS, FACTS, str(cache_folder())]

    @cached_property
    def conversations(self) -> list[tuple[Split, str, tuple[Message, ...]]]:
        """Side, where it comes from, and the two messages."""
        if self._kind == "digit-sums":
            return list(self._sums())
        examples = pictures() if self._kind == "digits" else recordings(self._speaker)
        asked = (
            ("What is this?", "Which digit is this?")
            if self._kind == "digits"
            else ("What is this?", "Which digit do you hear?")
        )
        return [
            (
                one.split,
                f"{self.name}, {one.path.name}",
                _exchange([one.part, _text(asked[number % len(asked)])], str(one.digit)),
            )
            for number, one in enumerate(examples)
        ]

    def _sums(self) -> Iterator[tuple[Split, str, tuple[Message, ...]]]:
        """A picture and a recording of one side, in either order, and a question that needs both.

        Whether they are the same is asked half the time of two that are. To train on, there is also text alone: what
        is right about two digits is learned sooner from lines that say which they are.
        """
        for number, (shown_digit, spoken_digit, question) in enumerate(facts() * FACTS):
            content = [_text(f"{shown_digit},{spoken_digit} {question}")]
            answer = answer_to(question, shown_digit, spoken_digit)
            yield "train", f"{self.name}, fact {number}", _exchange(content, answer)
        seen, heard = pictures(), recordings()
        for side in SIDES:
            shown = [one for one in seen if one.split == side]
            spoken = [one for one in heard if one.split == side]
            by_digit = [[one for one in spoken if one.digit == digit] for digit in range(10)]
            draws = np.random.Philox(key=np.array([VERSION, side == "valid"], np.uint64))
            raw = draws.random_raw(6 * SUMS[side]).reshape(-1, 6) >> np.uint64(11)
            for number, (p, r, equal, order, again, _) in enumerate(raw.tolist()):
                question = QUESTIONS[number % len(QUESTIONS)]
                picture, recording = shown[p % len(shown)], spoken[r % len(spoken)]
                if question == "same?" and equal % 2:
                    alike = by_digit[picture.digit]
                    recording = alike[again % len(alike)]
                media = [picture.part, recording.part]
                answer = answer_to(question, picture.digit, recording.digit)
                parts = [*(media if order % 2 else media[::-1]), _text(question)]
                yield side, f"{self.name}, {side} {number}", _exchange(parts, answer)


def facts() -> list[tuple[int, int, str]]:
    """Every two digits with every question; those that are the same more often, where the answer turns on that."""
    pairs = [(shown, spoken, question) for shown in range(10) for spoken in range(10) for question in QUESTIONS]
    return pairs + [(digit, digit, question) for digit in range(10) for question in ("same?", "larger?")] * 4


def answer_to(question: str, shown: int, spoken: int) -> str:
    """What is right about a picture of one digit and a recording of another: both named, then what was asked.

    "6+5=11", "6,5: no", "6,5: the picture". A small model learns to add digits that it has written down, as it learns
    any text, far sooner than digits that stand nowhere (arXiv 2112.00114). No space before a digit: a tokenizer would
    make it another token there, and whether two are the same is hardly learned of tokens that never are.
    """
    if question == "sum?":
        return f"{shown}+{spoken}={shown + spoken}"
    if question == "same?":
        return f"{shown},{spoken}: {'yes' if shown == spoken else 'no'}"
    assert question == "larger?", question
    return f"{shown},{spoken}: " + ("neither" if shown == spoken else "the picture" if shown > spoken else "the sound")


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _exchange(parts: list[Part], answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})


_SETS = (DigitSet("digits"), DigitSet("fsdd"), DigitSet("digit-sums"), *(DigitSet("fsdd", name) for name in SPEAKERS))
DIGIT_SETS = {made.name: made for made in _SETS}
