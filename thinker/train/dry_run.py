"""What `thinker train --dry-run` tells of a run before there is one: its size, its length, its memory, its time.

Nothing is written but the tokens of the text, which are kept anyway. Memory is worked out in `estimate.py`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..config import ThinkerConfig
from ..data.shards import Corpus
from ..loss import NextTokenLoss
from .allocator import forget_peak, free_memory, peak, trim
from .config import TrainConfig
from .decide import Decisions, Precision, choose_device, decide, versions
from .estimate import Estimate, Plan, changes, measured
from .ingredients import batches_of, ingredients
from .loop import take_step
from .recipes import choose_first, with_choices
from .rehearsal import PARTS
from .start import with_recipe

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
STEPS = 3


@dataclass(frozen=True)
class DryRun:
    """Bytes, seconds, tokens. What isn't known is None: a time that was not probed, a limit that nobody tells."""

    estimate: Estimate
    decisions: Decisions
    parameters: dict[str, int]
    tokens_in_data: int
    tokens_per_step: int
    steps: int | None
    epochs: float | None
    seconds: float | None  # of the whole training
    seconds_per_step: float | None  # uncompiled, in the probe
    measured: int | None  # the peak of the probe
    limit: int | None
    given: bool  # the limit, with --memory
    nearest: Estimate | None

    @property
    def fits(self) -> bool:
        """Whether the run stays within the limit, if there is one."""
        return self.limit is None or self.estimate.peak <= self.limit

    @property
    def remedy(self) -> str | None:
        """The flags that make it fit; None where it fits, or nothing does."""
        if self.nearest is None:
            return None
        first = self.estimate
        return changes(first.config, first.settings, self.nearest.config, self.nearest.settings)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "parameters": self.parameters | {"total": sum(self.parameters.values())},
            "tokens": {"data": self.tokens_in_data, "step": self.tokens_per_step},
            "steps": self.steps,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "seconds_per_step_uncompiled": self.seconds_per_step,
            "memory": {
                "process": self.estimate.base,
                "parts": {part: self.estimate.rehearsal.whole.get(part, 0) for part in PARTS},
                "parts_at_peak": {part: self.estimate.rehearsal.at_peak.get(part, 0) for part in PARTS},
                "holes": self.estimate.holes,
                "peak": self.estimate.peak,
                "measured_peak": self.measured,
                "limit": self.limit,
            },
            "fits": self.fits,
            "nearest": None if self.nearest is None else {"flags": self.remedy, "peak": self.nearest.peak},
            "decisions": self.decisions.to_json() | {"seconds_per_step": self.seconds_per_step},
        }


def read_size(text: str) -> int:
    """Bytes of a size such as 12GB or 800M. GB is 1000³, GiB and G alone 1024³. Raises `ValueError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    size = 0
    if found is not None and not (found[3] and not found[4]):
        unit = found[2].upper()
        decimal = found[4] and not found[3]
        size = int(float(found[1]) * (1000 ** "_KMGT".index(unit) if unit and decimal else UNITS[unit]))
    if size < 1:
        raise ValueError(f"memory is {text!r}: give a size such as 12GB, 800M or 3.5GiB")
    return size


def dry_run(
    config: ThinkerConfig, settings: TrainConfig, given: set[str], memory: int | None, say: Callable[[str], None]
) -> DryRun:
    """Work everything out. `memory` is the limit in bytes, unset what this machine has free. Raises `ValueError`.

    What is probed is probed only where it fits this machine.
    """
    fixed = given | config.model_fields_set
    found = ingredients(config, settings, given, say)
    if found.senses is not None:
        raise ValueError("--dry-run works out what text takes, not pictures and sounds: drop it, or the media")
    corpus, choices = found.corpus, choose_first(found.config, settings, fixed)
    settings, config = with_choices(settings, found.config, choices)
    batches = batches_of(corpus, settings, config, say)
    device = choose_device("auto") if settings.device == "auto" else settings.device
    try:
        here, free = torch.device(device).type == "cpu", free_memory()
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from None
    limit = memory if memory is not None else (free if here else _free_on(device))
    plan = Plan(corpus, found.publication, _undecided(settings, device, "float32" if here else "bfloat16"))
    probed = False
    if here:
        say("rehearsing the steps")
        plan = measured(plan, config, settings)
        eager = plan.estimate(config, settings)
        probed = free is None or eager.peak <= free
        plan = measured(replace(plan, decisions=_decided(plan, eager, free, say)), config, settings)
    config, settings, decisions = with_recipe(config, settings, plan.decisions, fixed, choices, batches)
    plan = replace(plan, decisions=decisions)
    say("rehearsing the steps")
    estimate = plan.estimate(config, settings)
    seconds = held = None
    if probed:
        say("probing three steps, uncompiled")
        seconds, held = _probe(plan, config, settings)
    expected = None if seconds is None else seconds / decisions.compiled_gain
    steps, whole = settings.limit
    if steps is None and expected is not None and whole is not None:
        steps = max(1, round(whole / expected))
    if whole is None and steps is not None and expected is not None:
        whole = steps * expected
    nearest = None
    if limit is not None and estimate.peak > limit:
        nearest = plan.nearest(estimate, limit, say)
    return DryRun(
        estimate=estimate,
        decisions=decisions,
        parameters=config.parameter_counts(),
        tokens_in_data=len(corpus.train) if isinstance(corpus, Corpus) else int(corpus.train.places.sum()),
        tokens_per_step=batches.tokens_per_batch,
        steps=steps,
        epochs=None if steps is None else batches.epochs(steps),
        seconds=whole,
        seconds_per_step=seconds,
        measured=held,
        limit=limit,
        given=memory is not None,
        nearest=nearest,
    )


def show(report: DryRun, console: Console) -> None:
    """What a person reads."""
    estimate, parts = report.estimate, ", ".join(f"{name} {count:,}" for name, count in report.parameters.items())
    lines = [f"Parameters: {sum(report.parameters.values()):,} ({parts})"]
    length = f"Tokens: {report.tokens_in_data:,} in the data, {report.tokens_per_step:,} a step"
    if report.steps is not None and report.epochs is not None:
        length += f"; {report.steps:,} steps are {report.epochs:.2f} epochs"
    lines += [length, *report.decisions.reasons]
    console.print(*lines, sep="\n", soft_wrap=True, markup=False)
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in ("memory", "most there is", "at the peak"):
        table.add_column(name, justify="left" if name == "memory" else "right", no_wrap=True)
    table.add_row("process and libraries", megabytes(estimate.base), megabytes(estimate.base))
    for part in PARTS:
        whole, at_peak = (sizes.get(part, 0) for sizes in (estimate.rehearsal.whole, estimate.rehearsal.at_peak))
        table.add_row(part, megabytes(whole), megabytes(at_peak))
    table.add_row("holes between tensors, report", "", megabytes(estimate.holes))
    table.add_row("peak", "", megabytes(estimate.peak), style="bold")
    console.print(table)
    console.print(*_verdict(report), sep="\n", soft_wrap=True, markup=False)


def _verdict(report: DryRun) -> list[str]:
    """Time, whether it fits, and what does."""
    lines = []
    if torch.device(report.decisions.device).type != "cpu":
        lines.append("For an accelerator these figures are computed, not measured; the time is not known.")
    elif report.seconds_per_step is None:
        lines.append("Time: not probed, since a step does not fit this machine.")
    else:
        told = f"Time: {report.seconds_per_step:.2f} s a step in a probe of {STEPS}, uncompiled"
        if report.decisions.compile:
            told += "; the run compiles, after which a step takes less, by an eighth to a third"
        lines.append(f"{told}. Training takes some {report.seconds:,.0f} s in all.")
    if report.measured is not None:
        lines.append(f"Measured in the probe: {megabytes(report.measured)} at the peak of its steps.")
    if report.limit is None:
        return [*lines, "Nobody tells how much memory this machine has: name a limit with --memory 12GB."]
    limit = f"{megabytes(report.limit)} {'given' if report.given else 'free'}"
    if report.fits:
        return [*lines, f"It fits: {megabytes(report.estimate.peak)} of {limit}."]
    lines.append(f"It does not fit: {megabytes(report.estimate.peak)} of {limit}.")
    if report.nearest is None:
        return [*lines, "No smaller batch or context fits either: lower --d-model, --n-layers or --vocab-size."]
    return [*lines, f"Nearest that fits: {report.remedy} ({megabytes(report.nearest.peak)})."]


def megabytes(size: int) -> str:
    """Bytes as a person reads them, in millions."""
    return f"{size / 1e6:,.0f} MB"


def _undecided(settings: TrainConfig, device: str, otherwise: Precision) -> Decisions:
    """What a run decides without looking at the machine."""
    precision: Precision = otherwise if settings.precision == "auto" else settings.precision
    # Of a step whose time is not known no number is expected: so little text is repeated, for all that is known.
    return Decisions(device, precision, settings.compile == "on", torch.get_num_threads(), math.inf, (), versions())


def _decided(plan: Plan, first: Estimate, free: int | None, say: Callable[[str], None]) -> Decisions:
    """What the run would decide, probed with one row, as when it begins, if that fits this machine."""
    config, settings = first.config, first.settings
    if free is not None and first.peak > free:
        one_row = plan.estimate(config, settings.changed(batch_size=1, accumulate=1, text=()))
        if one_row.peak > free:
            reason = f"{plan.decisions.precision}, not compiled: one row is too much for this machine to probe"
            return replace(plan.decisions, reasons=(reason,))
    say("probing one row")
    run = plan.run(config, settings)
    row = tuple(torch.from_numpy(part[:1]) for part in run.batches.batch(0))
    return decide(settings, NextTokenLoss(run.model), row, "cpu")


def _probe(plan: Plan, config: ThinkerConfig, settings: TrainConfig) -> tuple[float, int | None]:
    """Seconds of the faster of the last two of three steps, uncompiled, and the peak of memory meanwhile, if known."""
    trim()
    known = forget_peak()
    torch.manual_seed(settings.seed)
    run = plan.run(config, settings)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        take_step(run, run.module, 1.0)
        run.step += 1
        times.append(time.perf_counter() - start)
    return min(times[1:]), peak() if known and not plan.decisions.compile else None


def _free_on(device: str) -> int:
    """Free bytes of an accelerator. Raises `ValueError` where there is none to ask."""
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, which can't be asked for its memory here: name it with --memory 12GB")
    return int(torch.cuda.mem_get_info(device)[0])
