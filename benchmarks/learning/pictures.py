"""Pictures of learning: the mean of several seeds, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

COLOURS = ("#888888", "#c2452d", "#2b5c8f", "#3a8a5b", "#8a5bb0", "#b8862b")


def learning(
    path: Path,
    runs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    axis: Literal["tokens", "seconds"],
    seconds_a_step: Mapping[str, float] | None = None,
    value: str = "held-out loss, nats per token",
) -> None:
    """Held-out loss against tokens, or against seconds as steps times the seconds a step measured in turns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for colour, name in zip(COLOURS, names, strict=False):
        chosen = [run["looks"] for run in runs if run["name"] == name]
        if not chosen:
            continue
        steps = np.array([look["step"] for look in chosen[0]])
        tokens = np.array([look["tokens"] for look in chosen[0]])
        x = tokens / 1e6 if seconds_a_step is None else steps * seconds_a_step[name]
        losses = np.array([[look["loss"] for look in looks] for looks in chosen])
        label = f"{name}: {losses[:, -1].mean():.3f}, {len(losses)} seed{'s' if len(losses) > 1 else ''}"
        axes.plot(x, losses.mean(axis=0), color=colour, marker="o", markersize=3, label=label)
        axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("million tokens" if axis == "tokens" else "seconds on one core, evaluation apart")
    axes.set_ylabel(value)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
