"""Every picture that Thinker draws, each from plain numbers to a PNG file. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, TRAIN, HELD_OUT = "#333333", "#9ab8d9", "#c2452d"


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
    """A picture, uint8 (H, W) or (H, W, 3), or the log-mel frames of a sound (F, M), and what was looked at in it."""

    values: np.ndarray
    attention: np.ndarray  # (rows, columns) of patches, or (positions,) in time

    @property
    def is_sound(self) -> bool:
        """Whether it is frames of a sound."""
        return self.attention.ndim == 1


@dataclass(frozen=True)
class Example:
    """A question about pictures and sounds, what is right, and what the model said."""

    media: Sequence[Shown]
    question: str
    right: str
    said: str


def answered(path: Path, examples: Sequence[Example]) -> None:
    """Examples with the model's answers as `path`: a column each, and in red what it attended to as it answered."""
    from matplotlib.figure import Figure

    tallest = max(len(example.media) for example in examples)
    figure = Figure(figsize=(2.1 * len(examples), 2.2 * tallest + 1.2), dpi=120, layout="constrained")
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
            axes.set_title("recording, pitch over time" if example.media[row].is_sound else "picture", fontsize=8)
        exact = example.said.strip() == example.right.strip()
        about = "" if exact else f"\n(right: {example.right})"
        last = grid[len(example.media) - 1, column]
        last.set_xlabel(
            f"{example.question}\n{example.said}{about}",
            fontsize=12,
            color="#2c7a3f" if exact else HELD_OUT,
            parse_math=False,  # two dollar signs are no formula
        )
    figure.suptitle(
        "Never seen nor heard in training: what it was given, the question, its answer. Red: what it attended to as it "
        "answered.",
        fontsize=11,
    )
    figure.savefig(path)


def _show(axes: Axes, shown: Shown) -> None:
    """One picture or spectrogram, with attention as a red veil."""
    height, width = (shown.values.T if shown.is_sound else shown.values).shape[:2]
    extent = (0, width, 0, height)
    if shown.is_sound:
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
