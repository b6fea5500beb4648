"""Which picture, recording or features a part of a message means: a path, or a data URI; and opening it as an array.

`Medium` names one; `Medium.prepared` is what an encoder takes: pixels, log-mel frames, or features from elsewhere, as
small numpy arrays. How pictures and sounds are decoded is in `pictures.py` and `sounds.py`. Every error carries the
name of the file.
"""

# H height, W width, C channels of a picture, F log-mel frames, M mel bands, N positions

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..messages import Part, file_of
from ..places import expand_home
from .settings import FeatureConfig, Kind, PictureConfig, SensesConfig, SoundConfig

FEATURE_SUFFIXES = frozenset({".npy", ".safetensors"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus", ".au"})
LARGEST_FILE = 1 << 28  # bytes


@dataclass(frozen=True)
class Medium:
    """One picture or recording: a file, or the bytes of a data URI under a short name."""

    kind: Kind
    name: str  # what messages about it say
    path: Path | None = None
    data: bytes | None = None

    @property
    def key(self) -> str:
        """Equal for equal media: the file's path, or the hash of the bytes."""
        if self.path is not None:
            return f"{self.kind} {self.path}"
        assert self.data is not None
        return f"{self.kind} {hashlib.sha256(self.data).hexdigest()}"

    @property
    def state(self) -> list[Any]:
        """JSON values that change when the file may have changed."""
        if self.path is None:
            return [self.key]
        try:
            found = os.stat(self.path)
        except OSError:
            return self.gone
        return [self.key, found.st_size, found.st_mtime_ns]

    @property
    def gone(self) -> list[Any]:
        """The state of a file that isn't there."""
        return [self.key, None]

    @property
    def holds_features(self) -> bool:
        """Whether it is features from elsewhere, by its name."""
        return self.path is not None and self.path.suffix.lower() in FEATURE_SUFFIXES

    def open(self) -> BinaryIO:
        """Its bytes. Raises `ValueError` for a file that can't be read, is empty, or is larger than 256 MiB."""
        if self.path is None:
            assert self.data is not None
            return io.BytesIO(self.data)
        try:
            if self.path.is_dir():
                raise ValueError(f"{self.name}: is a folder, no file")
            size = self.path.stat().st_size
            if size == 0:
                raise ValueError(f"{self.name}: the file is empty")
            if size > LARGEST_FILE:
                raise ValueError(f"{self.name}: {size:,} bytes are more than the {LARGEST_FILE:,} that are opened")
            return self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{self.name}: {error.strerror}") from None

    def prepared(self, config: SensesConfig) -> np.ndarray:
        """What this model's encoder takes: uint8 (H, W, C), float32 (F, M), or float32 features (N, width).

        Raises `ValueError` with the file's name and the reason.
        """
        wanted = config.needed(self.kind)
        if isinstance(wanted, FeatureConfig):
            return self.features(wanted.width)
        if self.holds_features:
            raise ValueError(f"{self.name}: holds features, and this model has an encoder of its own for {self.kind}")
        if isinstance(wanted, PictureConfig):
            from .pictures import read_picture

            with self.open() as file:
                return read_picture(file, self.name, wanted)
        assert isinstance(wanted, SoundConfig)
        from .sounds import read_sound

        with self.open() as file:
            return read_sound(file, self.name, wanted)

    def features(self, width: int | None = None) -> np.ndarray:
        """Features from elsewhere, float32 (N, width); a single vector counts as (1, width). Raises `ValueError`."""
        if not self.holds_features or self.path is None:
            raise ValueError(
                f"{self.name}: this model takes features of {self.kind} as .npy or .safetensors: make them with "
                "thinker encode"
            )
        self.open().close()
        return check_features(_read_features(self.path, self.name), self.name, width)


def positions(config: SensesConfig, kind: Kind, prepared: np.ndarray) -> int:
    """How many positions of the stream a prepared medium takes."""
    wanted = config.needed(kind)
    if isinstance(wanted, PictureConfig):
        return wanted.positions
    return wanted.positions(len(prepared)) if isinstance(wanted, SoundConfig) else len(prepared)


def check_features(array: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    """Features as float32 (N, width). Raises `ValueError` for another shape or width, and for NaN."""
    shape = array.shape
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: features are {array.dtype} of shape {shape}: give numbers, n × width")
    if width is not None and array.shape[1] != width:
        raise ValueError(f"{name}: features are {array.shape[1]} wide, this model takes {width}")
    with np.errstate(over="ignore"):  # refused below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN, infinity, or what is too large for float32")
    return array


def _read_features(path: Path, name: str) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        try:  # mapped, so that a shape beyond the file's end is no reason to ask for the memory
            return np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # numpy takes the header for Python, and a damaged one may raise whatever it likes
            raise ValueError(f"{name}: can't be read as .npy ({error})") from None
    from safetensors.torch import load_file  # numpy alone knows no bfloat16

    try:
        tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in load_file(path).values()]
    except Exception as error:  # likewise; and torch can't convert every type that a file may have
        raise ValueError(f"{name}: can't be read as safetensors ({error})") from None
    if len(tensors) != 1:
        raise ValueError(f"{name}: holds {len(tensors)} tensors: give one, n × width")
    return tensors[0].numpy()


def medium_of(part: Part, folder: Path | None = None) -> Medium:
    """What a part of a message means, `{"type": "image", "image": "7.png"}` say; relative paths begin at `folder`.

    Raises `ValueError` for a data URI that is none, for what can be no file's name, and for addresses on the network,
    which are never fetched.
    """
    kind: Kind = part["type"]
    given = file_of(part)
    if given.startswith("data:"):
        return _from_uri(kind, given)
    if "://" in given:
        raise ValueError(f"{given[:80]}: nothing is fetched from the network: download it and give the file")
    if "\0" in given:
        raise ValueError(f"{given[:80]!r}: no file's name holds a zero byte")
    path = expand_home(given)
    return Medium(kind, given, path if folder is None or path.is_absolute() else folder / path)


def attachment(given: str | Path) -> dict[str, str]:
    """A file as a part of a message; its ending tells what it is. Raises `ValueError` where that is not known.

    Features from elsewhere say it in front of their ending: cat.image.npy, bark.audio.safetensors.
    """
    path = Path(given)
    suffix = path.suffix.lower()
    said = Path(path.stem).suffix.lower().removeprefix(".") if suffix in FEATURE_SUFFIXES else ""
    if suffix in IMAGE_SUFFIXES or said == "image":
        return {"type": "image", "image": str(given)}
    if suffix in AUDIO_SUFFIXES or said == "audio":
        return {"type": "audio", "audio": str(given)}
    if suffix in FEATURE_SUFFIXES:
        raise ValueError(f"{given}: features of what? Name the file NAME.image{suffix} or NAME.audio{suffix}")
    known = " ".join(sorted(IMAGE_SUFFIXES | AUDIO_SUFFIXES | FEATURE_SUFFIXES))
    raise ValueError(f"{given}: neither a picture nor a sound by its ending {suffix!r}: known are {known}")


def _from_uri(kind: Kind, uri: str) -> Medium:
    """The bytes of data:image/png;base64,… (RFC 2397)."""
    about, comma, text = uri.partition(",")
    name = f"{about[:40]},…"
    if not comma:
        raise ValueError(f"{name}: a data URI has a comma before its data")
    try:
        if about.lower().endswith(";base64"):
            data = base64.b64decode(urllib.parse.unquote(text), validate=True)
        else:
            data = urllib.parse.unquote_to_bytes(text)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: is not base64 ({error})") from None
    if not data:
        raise ValueError(f"{name}: holds no bytes")
    return Medium(kind, name, data=data)
