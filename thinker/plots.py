"""Every picture that Thinker draws, each from plain numbers to a PNG file. matplotlib is imported when one is drawn."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, TRAIN, HELD_OUT = "#333333", "#9ab8d9", "#c2452d"
COLUMN = 24  # letters that stand side by side under a picture
# The first comes with matplotlib; the others have letters that it lacks, and none of them is everywhere.
FONTS = (
    "DejaVu Sans, Noto Sans, Noto Sans CJK SC, Noto Sans CJK JP, Noto Sans SC, Source Han Sans SC, WenQuanYi Zen Hei, "
    "WenQuanYi Micro Hei, PingFang SC, Hiragino Sans, Microsoft YaHei, SimHei, Yu Gothic, Malgun Gothic"
).split(", ")


def loss_curve(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    yardstick: float | None = None,
) -> None:
    """Training loss (nats per token, every step) and held-out bits per byte, against steps, as `path`.

    yardstick: bits per byte that `xz -9` needs for the same held-out text.
    """
    from matplotlib.figure import Figure  # slow to import, and most commands draw nothing

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    left = figure.subplots()
    left.plot(steps, losses, color=TRAIN, linewidth=0.8, label="training loss, each step")
    left.plot(steps, smoothed(losses), color="#2b5c8f", linewidth=1.8, label="training loss, smoothed")
    left.set_xlabel("step")
    left.set_ylabel("nats per token", color="#2b5c8f")
    right = left.twinx()
    if held_out:
        right.plot(*zip(*held_out, strict=True), color=HELD_OUT, marker="o", markersize=3.5, label="held-out text")
    if yardstick is not None:
        right.axhline(yardstick, color=INK, linestyle=":", linewidth=1.2, label=f"xz -9: {yardstick:.3f}")
    right.set_ylabel("bits per byte", color=HELD_OUT)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    left.set_ylim(bottom=0)
    handles = [pair for axes in (left, right) for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    left.legend(*zip(*handles, strict=True), frameon=False, loc="lower left", ncols=2)
    figure.savefig(path)


@dataclass(frozen=True)
class Shown:
    """What a model was given, and what it attended to in it.

    Values are a picture, uint8 (H, W) or (H, W, 3), the log-mel frames of a sound (F, M), or None for features.
    """

    kind: Literal["image", "audio"]
    values: np.ndarray | None
    attention: np.ndarray  # (rows, columns) of patches, or (positions,)

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.values is None:
            return f"{'picture' if self.kind == 'image' else 'recording'}, as features"
        return "picture" if self.kind == "image" else "recording, pitch over time"


@dataclass(frozen=True)
class Example:
    """A question about pictures and sounds, what is right, and what the model said."""

    media: Sequence[Shown]
    question: str
    right: str
    said: str


def answered(path: Path, examples: Sequence[Example]) -> None:
    """Examples with the model's answers as `path`: a column each, and in red what it attended to as it answered."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    heading = textwrap.fill(
        "Never seen nor heard in training: what it was given, the question, its answer. Red: what it attended to as it "
        "answered.",
        COLUMN * len(examples),
    )
    exact = [example.said.strip() == example.right.strip() for example in examples]
    labels = []
    for example, right in zip(examples, exact, strict=True):
        lines = [example.question, example.said, *([] if right else [f"(right: {example.right})"])]
        labels.append("\n".join(map(in_column, lines)))
    tallest = max(len(example.media) for example in examples)
    lines_of_text = max(label.count("\n") for label in labels) + heading.count("\n")
    size = (2.1 * len(examples), 2.2 * tallest + 0.2 * lines_of_text + 0.8)
    installed = set(get_font_names())
    with matplotlib.rc_context({"font.family": [font for font in FONTS if font in installed]}):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        grid = figure.subplots(tallest, len(examples), squeeze=False)
        for column, example in enumerate(examples):
            for row in range(tallest):
                axes = grid[row, column]
                axes.set_xticks([])
                axes.set_yticks([])
                if row >= len(example.media):
                    axes.set_visible(False)
                    continue
                _show(axes, example.media[row])
                axes.set_title(example.media[row].title, fontsize=8)
            color = "#2c7a3f" if exact[column] else HELD_OUT
            last = grid[len(example.media) - 1, column]
            last.set_xlabel(labels[column], fontsize=10, color=color, parse_math=False)  # two dollars are no formula
        figure.suptitle(heading, fontsize=11)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # once for each letter that none has
            figure.savefig(path)


def in_column(text: str) -> str:
    """A text in at most four lines of a column's width; Chinese letters, and boxes of control codes, count as two."""
    wide = any(unicodedata.east_asian_width(c) in "WF" or unicodedata.category(c) == "Cc" for c in text)
    return "\n".join(textwrap.wrap(text, COLUMN // 2 if wide else COLUMN, max_lines=4, placeholder=" …"))


def _show(axes: Axes, shown: Shown) -> None:
    """One picture or spectrogram with attention as a red veil; features as bars of attention."""
    if shown.values is None:
        axes.bar(range(len(shown.attention)), shown.attention, color=HELD_OUT)
        return
    sound = shown.kind == "audio"
    height, width = (shown.values.T if sound else shown.values).shape[:2]
    extent = (0, width, 0, height)
    if sound:
        axes.imshow(shown.values.T, origin="lower", cmap="gray_r", aspect="auto", extent=extent)
    else:
        axes.imshow(shown.values, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    least, most = float(shown.attention.min()), float(shown.attention.max())
    weights = (np.atleast_2d(shown.attention) - least) / max(most - least, 1e-12)
    veil = np.zeros((*weights.shape, 4))
    veil[..., 0], veil[..., 3] = 0.85, 0.6 * weights
    axes.imshow(veil, origin="upper", extent=extent, aspect="auto", interpolation="nearest")
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential average, corrected for its start."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result
