"""Every picture that Thinker draws, each from plain numbers to a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential average, corrected for its start."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result
