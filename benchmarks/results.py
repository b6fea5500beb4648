"""What turns come to: medians, ratios with their spread, the lines of the table, and what is written of them.

A kind of machine has a folder with its results.json and RESULTS.md; a table over all of them stands above.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .turns import Contestant, Meeting, Result

Results = Mapping[str, Result]


@dataclass(frozen=True)
class Target:
    """One line of "What to reach": at least this (at most, where less is better), and what would be a dream."""

    line: str
    at_least: float
    dream: float | None = None
    unit: str = "×"
    at_most: bool = False

    def met(self, value: float) -> str:
        """no, yes, or dream."""
        reached = [goal is not None and (value <= goal if self.at_most else value >= goal) for goal in self.goals]
        return "dream" if reached[1] else "yes" if reached[0] else "no"

    def said(self, value: float) -> str:
        """A value with its unit, in three digits or as many as show on which side of a goal it is."""
        for digits in range(3, 17):
            short = f"{value:.{digits}g}"
            if self.met(float(short)) == self.met(value):
                break
        return f"{short} {self.unit}"

    @property
    def goals(self) -> tuple[float, float | None]:
        """Both numbers."""
        return self.at_least, self.dream


@dataclass(frozen=True)
class Figure:
    """A number with the quartiles of what the rounds gave one by one, and what it was made of, in words."""

    value: float
    low: float
    high: float
    how: str


@dataclass(frozen=True)
class Line:
    """A target and what was measured for it; no figure if a contestant is missing."""

    target: Target
    figure: Figure | None


@dataclass(frozen=True)
class Match:
    """Who meets whom, what is counted, and which lines follow. `models` must be built before."""

    name: str
    title: str
    unit: str
    contestants: tuple[Contestant, ...]
    judge: Callable[[Results], Sequence[Line]] = lambda results: ()
    models: tuple[str, ...] = ()
    rounds: int = 9
    warm_ups: int = 2


def ratio(results: Results, ours: str, others: Sequence[str]) -> Figure | None:
    """How many times as fast one is as the best of the others, by their medians; None if nobody is there.

    The spread is that of the ratios within each round, in which the machine was in the same mood for both.
    """
    there = [name for name in others if name in results]
    if ours not in results or not there:
        return None
    best = max(there, key=lambda name: median(results[name]))
    rounds = [a / b for a, b in zip(results[ours].rates, results[best].rates, strict=True)]
    low, high = quartiles(rounds)
    return Figure(median(results[ours]) / median(results[best]), low, high, f"{ours} / {best}")


def scaled(figure: Figure | None, factor: float, how: str) -> Figure | None:
    """The same in another unit."""
    if figure is None:
        return None
    return Figure(figure.value * factor, figure.low * factor, figure.high * factor, how)


def worst(figures: Sequence[Figure | None]) -> Figure | None:
    """The largest, where less is better."""
    there = [figure for figure in figures if figure is not None]
    return max(there, key=lambda figure: figure.value, default=None)


def median(result: Result) -> float:
    """Units per second."""
    return statistics.median(result.rates)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def as_json(match: Match, meeting: Meeting, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one match, for results.json."""
    lines = match.judge(meeting.results)
    return {
        "title": match.title,
        "unit": match.unit,
        "machine": dict(machine),
        "date": datetime.date.today().isoformat(),
        "other_work": meeting.other_work,
        "contestants": {name: asdict(result) for name, result in meeting.results.items()},
        "left_out": meeting.left_out,
        "lines": [
            {**asdict(line.target), "measured": None if line.figure is None else asdict(line.figure)} for line in lines
        ],
    }


def save(folder: Path, new: Mapping[str, Any]) -> None:
    """Put matches into results.json, in place of older ones of the same name, and write RESULTS.md from all."""
    matches = read(folder) | dict(new)
    (folder / "results.json").write_text(json.dumps(matches, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "RESULTS.md").write_text(as_markdown(matches), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The matches of a folder, by their names; of one without results.json none."""
    path = folder / "results.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def save_overview(folders: Path) -> None:
    """Write RESULTS.md beside the folders of all machines: each line of the table as it stands on each of them."""
    machines = {path.name: matches for path in sorted(folders.iterdir()) if (matches := read(path))}
    by_line: dict[str, dict[str, Any]] = {}
    for name, matches in machines.items():
        for line in (line for match in matches.values() for line in match["lines"]):
            by_line.setdefault(line["line"], {})[name] = line
    text = [
        "# Results",
        "",
        "Written by `make -C benchmarks`, which measures the machine it runs on and leaves the others as they are. A",
        "column is a kind of processor: one with AMX, or by LLVM's name for it (znver is AMD's Zen). Its folder has",
        "all figures, with spreads, versions and dates. **Bold** is as good as was dreamt of; what falls short of the",
        "least that is wanted says so. Those of training are aims for processors with bfloat16, which Zen 1 and 3",
        "haven't; Emerald Rapids, as measured here under a system that hides AMX, has it at half the speed of float32.",
        "llama.cpp is compiled for the processor, but without AMX, which GCC 12 breaks. The lines about learning are",
        "in [learning](learning/RESULTS.md).",
        "",
        *_table(
            ["", "at least", "dream", *(f"[{name}]({folders.name}/{name}/RESULTS.md)" for name in machines)],
            [
                [line, *_goals(_of(next(iter(there.values())))), *(_reached(there.get(name)) for name in machines)]
                for line, there in by_line.items()
            ],
        ),
        "",
        *(f"- {name}: {_when(matches)}" for name, matches in machines.items()),
    ]
    (folders.parent / "RESULTS.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def as_markdown(matches: Mapping[str, Any]) -> str:
    """RESULTS.md of one machine: the table of targets, then each match."""
    text = [
        "# Results",
        "",
        "Written by `make -C benchmarks`; a line again by `make -C benchmarks ONLY=name`. Both sides of a comparison",
        "take turns in one run, each in its own process; figures are medians, in brackets the quartiles of the rounds.",
        "Of ratios, the figure is that of the two medians, and the quartiles are those of the rounds' own ratios, so",
        "that it may lie outside. Dropout is 0 everywhere.",
        "",
        *_machines(matches),
        "",
        *_table(
            ["", "measured", "at least", "dream", "met", "by", "name"],
            [_target(line, name) for name, match in matches.items() for line in match["lines"]],
        ),
    ]
    for name, match in matches.items():
        text += ["", f"## {match['title']}", "", f"`{name}`, {match['date']}{_busy(match['other_work'])}", ""]
        text += _table(
            ["", match["unit"], "quartiles", "peak memory", "with"],
            [
                [who, *_numbers(result["rates"]), _megabytes(result), _about(result["about"])]
                for who, result in match["contestants"].items()
            ],
        )
        text += [f"\nLeft out: {who}, {why}." for who, why in match["left_out"].items()]
    if any(name.startswith("growth") for name in matches):
        text += ["", "![How cost grows](growth.png)"]
    return "\n".join(text) + "\n"


def _when(matches: Mapping[str, Any]) -> str:
    names = {f"{one['processor']} ({one['instructions']}), {one['cores']} cores" for one in _each(matches, "machine")}
    dates = sorted(_each(matches, "date"))
    return f"{'; '.join(sorted(names))}, {dates[0]} to {dates[-1]}"


def _each(matches: Mapping[str, Any], key: str) -> list[Any]:
    return [match[key] for match in matches.values()]


def _machines(matches: Mapping[str, Any]) -> list[str]:
    return sorted(set(map(describe, _each(matches, "machine"))))


def describe(machine: Mapping[str, Any]) -> str:
    """A machine in a line."""
    name = f"{machine['processor']} ({machine['instructions']})"
    return f"{name}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"


def _busy(share: float | None) -> str:
    return "" if share is None else f"; other work had {share:.0%} of the machine meanwhile"


def _of(line: Mapping[str, Any]) -> Target:
    return Target(line["line"], line["at_least"], line["dream"], line["unit"], line["at_most"])


def _goals(target: Target) -> list[str]:
    bound = "≤ " if target.at_most else ""
    return ["" if goal is None else f"{bound}{goal:g} {target.unit}" for goal in target.goals]


def _reached(line: Mapping[str, Any] | None) -> str:
    if line is None or line["measured"] is None:
        return "–"
    target, value = _of(line), line["measured"]["value"]
    said = target.said(value)
    return {"no": f"{said} (short)", "yes": said, "dream": f"**{said}**"}[target.met(value)]


def _target(line: Mapping[str, Any], match: str) -> list[str]:
    target = _of(line)
    goals = _goals(target)
    if line["measured"] is None:
        return [target.line, "–", *goals, "not measured", "", f"`{match}`"]
    measured = Figure(**line["measured"])
    spread = f"{target.said(measured.value)} ({measured.low:.3g} to {measured.high:.3g})"
    return [target.line, spread, *goals, target.met(measured.value), measured.how, f"`{match}`"]


def _numbers(rates: Sequence[float]) -> list[str]:
    low, high = quartiles(rates)
    return [_short(statistics.median(rates)), f"{_short(low)} to {_short(high)}"]


def _short(value: float) -> str:
    if value >= 1e8:
        return f"{value / 1e9:,.4g} G"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(result: Mapping[str, Any]) -> str:
    return f"{result['peak_memory'] / 1e6:,.0f} MB"


def _about(about: Mapping[str, Any]) -> str:
    """In short: what is longer is in results.json only."""
    words = {key: f"{value:,}" if type(value) is int else str(value) for key, value in about.items()}
    return ", ".join(f"{key} {value}" for key, value in words.items() if len(value) < 40)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
