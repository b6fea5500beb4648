"""How cost grows: decoding with the context, a training step with batch, length, depth, width and number of experts.

    python -m benchmarks.run growth-context growth-batch growth-length growth-depth growth-width growth-experts

The theoretical line beside what was measured is the work that `thinker.bench.costs` computes, at the speed of the
machine that was measured in the same turns: reading memory for decoding, products of matrices for training. Training is
eager here: to compile every point would take an hour.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thinker.bench import costs

from . import models
from .results import Match
from .train_step import FAST, PRODUCTS, ROWS, TINY, ours
from .turns import Contestant

CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
DTYPES = ("float32", "int8")
READING = "reading memory, bytes/s"
# What changes in a training step: its name, its values, and the architecture and rows that each makes.
SWEEPS: dict[str, tuple[str, Sequence[int], Callable[[int], tuple[dict[str, Any], int]]]] = {
    "growth-batch": ("rows in a batch", (1, 2, 4, 8, 16, 32), lambda rows: ({}, rows)),
    "growth-length": (
        "tokens in a row, 4,096 in a step",
        (64, 128, 256, 512, 1024, 2048),
        lambda T: ({"ctx_len": T}, 4096 // T or 1),
    ),
    "growth-depth": ("layers", (1, 2, 4, 8, 16), lambda layers: ({"n_layers": layers}, ROWS)),
    "growth-width": (
        "d_model",
        (64, 128, 256, 512, 768),
        lambda width: ({"d_model": width, "n_heads": width // 64, "d_ff": 4 * width}, ROWS),
    ),
    "growth-experts": (
        "experts, two of them per token",
        (2, 4, 8, 16, 32),
        lambda count: ({"use_moe": True, "num_experts": count, "d_ff": TINY.d_ff // 2}, ROWS),
    ),
}


def context_match() -> Match:
    """Decoding, with the context."""
    read = round(costs.decode_bytes(TINY, "float32", 1, 0))
    contestants = [
        Contestant(
            f"{dtype} at {context}",
            "benchmarks.contestants.ours:next_token",
            {"model": str(models.TINY_LONG), "dtype": dtype, "context": context, "cached": True},
        )
        for dtype in DTYPES
        for context in CONTEXTS
    ]
    limit = Contestant(READING, "benchmarks.contestants.limit:reading", {"size": read})
    title = "Decoding at a context of so many tokens, one stream"
    return Match("growth-context", title, "tokens/s", (*contestants, limit), models=("tiny-long",), rounds=5)


def training_match(name: str) -> Match:
    """Training steps, with one of the sizes."""
    what, values, shape = SWEEPS[name]
    contestants = []
    for value in values:
        architecture, rows = shape(value)
        contestants.append(ours(str(value), architecture, compile="off", batch_size=rows))
    limit = Contestant(PRODUCTS, "benchmarks.contestants.limit:products", {"dtype": FAST})
    title = f"Training step, eager {FAST}, by {what}"
    return Match(name, title, "tokens/s", (*contestants, limit), rounds=5, warm_ups=1)


MATCHES: tuple[Match, ...] = (context_match(), *(training_match(name) for name in SWEEPS))


def draw(folder: Path) -> None:
    """growth.png from results.json, with the panels that are there."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    matches = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    there = [match.name for match in MATCHES if match.name in matches]
    if not there:
        return
    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes in panels[len(there) :]:
        axes.set_visible(False)
    for name, axes in zip(there, panels, strict=False):
        rates = {who: sorted(result["rates"]) for who, result in matches[name]["contestants"].items()}
        (draw_context if name == "growth-context" else draw_training)(axes, name, rates)
        axes.set(xscale="log", yscale="log")
        values = CONTEXTS if name == "growth-context" else SWEEPS[name][1]
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.minorticks_off()
        axes.margins(y=0.25)  # room for the legend
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "growth.png")


def draw_context(axes: Any, name: str, rates: dict[str, list[float]]) -> None:
    """Microseconds a token."""
    for dtype, colour in zip(DTYPES, ("#2b5c8f", "#c2452d"), strict=True):
        points = {context: rates[f"{dtype} at {context}"] for context in CONTEXTS if f"{dtype} at {context}" in rates}
        draw_points(axes, points, lambda context, rate: 1e6 / rate, dtype, colour)
        if READING in rates:
            cost = [costs.decode_bytes(TINY, dtype, 1, context) for context in points]
            least = [1e6 * size / middle(rates[READING]) for size in cost]
            axes.plot(list(points), least, color=colour, linestyle=":", label=f"{dtype}, reading alone")
    axes.set(title="Decoding one stream, context", xlabel="tokens of context", ylabel="µs a token")


def draw_training(axes: Any, name: str, rates: dict[str, list[float]]) -> None:
    """Milliseconds a step."""
    what, values, shape = SWEEPS[name]
    points = {value: rates[str(value)] for value in values if str(value) in rates}

    def tokens(value: int) -> int:
        architecture, rows = shape(value)
        return rows * int(architecture.get("ctx_len", TINY.ctx_len))

    draw_points(axes, points, lambda value, rate: 1e3 * tokens(value) / rate, "measured", "#2b5c8f")
    # Those that were measured there: what this machine is fastest in may be another type.
    products = next((found for who, found in rates.items() if who.endswith(PRODUCTS.removeprefix(FAST))), None)
    if products is not None:
        configs = {value: TINY.changed(**shape(value)[0]) for value in points}
        work = [tokens(value) * costs.training_flops(config, config.ctx_len) for value, config in configs.items()]
        axes.plot(
            list(points), [1e3 * flops / middle(products) for flops in work],
            color="#2b5c8f", linestyle=":", label="products alone",
        )  # fmt: skip
    axes.set(title=f"A training step, {name.removeprefix('growth-')}", xlabel=what, ylabel="ms a step")


def draw_points(
    axes: Any, points: dict[int, list[float]], cost: Callable[[int, float], float], label: str, colour: str
) -> None:
    """Medians, with bars from the fastest round to the slowest."""
    middles = [cost(value, middle(rates)) for value, rates in points.items()]
    below = [m - cost(value, rates[-1]) for m, (value, rates) in zip(middles, points.items(), strict=True)]
    above = [cost(value, rates[0]) - m for m, (value, rates) in zip(middles, points.items(), strict=True)]
    axes.errorbar(list(points), middles, yerr=[below, above], color=colour, marker="o", markersize=4, label=label)


def middle(rates: Sequence[float]) -> float:
    """The median of sorted rates."""
    half = len(rates) // 2
    return rates[half] if len(rates) % 2 else (rates[half - 1] + rates[half]) / 2
