"""A picture's file to pixels of one size, by Pillow. Sizes are bounded before anything is decoded.

Cutting into patches and everything learned is in `vision.py`.
"""

# S side of the scaled picture, C channels

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np

from .settings import NotInstalled, PictureConfig

# Not all that Pillow knows: for PostScript, whatever a file's name, it starts Ghostscript. JPEG brings MPO.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 50_000_000  # of the file's picture: a decompression bomb has more


def read_picture(file: BinaryIO, name: str, config: PictureConfig) -> np.ndarray:
    """The picture scaled to the config's square, uint8 (S, S, C); transparency lies on white.

    Raises `ValueError` with the name and the reason: damaged, animated, more than 50 million pixels, no Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise NotInstalled("pictures", "Pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bound warns, ours refuses
            picture: Image.Image = Image.open(file, formats=FORMATS)
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise ValueError(
                    f"{name}: {width} × {height} is {width * height:,} pixels, more than the {MOST_PIXELS:,} that are "
                    "decoded: scale it down first"
                )
            # In a camera's MPO the first picture is the photo, and the others are views or previews of it.
            if picture.format != "MPO" and (frames := getattr(picture, "n_frames", 1)) > 1:
                raise ValueError(f"{name}: is animated, {frames} frames where 1 is taken: save one of them")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F", "I;16", "I;16B"):
                picture = _eight_bits(picture, name)
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                ground = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(ground, picture)
            picture = picture.convert("L" if config.channels == 1 else "RGB")
            picture = picture.resize((config.size, config.size), Image.Resampling.BILINEAR)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: has more than the {MOST_PIXELS:,} pixels that are decoded ({error})") from None
    except Exception as error:  # for a damaged file a decoder may raise whatever it likes
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {_said(error)}") from None
    return np.asarray(picture, np.uint8).reshape(config.size, config.size, config.channels)


def _said(error: BaseException) -> str:
    """Pillow's reason on one line; a file that it doesn't know has an address in memory in its message."""
    text = " ".join(str(error).split())
    unknown = "cannot identify" in text or not text
    return f"is no picture that can be read ({', '.join(FORMATS)})" if unknown else f"is damaged ({text})"


def _eight_bits(picture, name):  # type: ignore[no-untyped-def]
    """16-bit, 32-bit and float greys spread over 0 to 255; Pillow alone would cut them off."""
    from PIL import Image

    values = np.asarray(picture, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: holds NaN or infinity")
    low, high = min(float(values.min()), 0.0), float(values.max())
    white = max(high, 65535.0 if picture.mode.startswith("I") and high > 255 else 1.0)
    return Image.fromarray(np.round(255 * ((values - low) / (white - low))).astype(np.uint8))
