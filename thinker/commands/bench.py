"""`thinker bench [MODEL]`: how fast this machine runs and trains a model, beside what it could do at best."""

from __future__ import annotations

from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..bench.report import QUICK, Patience, Report, measure
from ..bench.speed import random_model
from ..checkpoint.files import to_json
from ..config import ThinkerConfig
from ..formats import open_model
from .flags import Flag


class Options(BaseModel):
    """Measure speeds and the limits of this machine. Takes a minute or two; nothing else should run meanwhile."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = Field(
        None, description="a Thinker directory, a Hugging Face folder, or a .gguf file; unset means the tiny one"
    )
    quick: Annotated[bool, Flag] = Field(False, description="rougher figures in some twenty seconds, nothing compiled")
    as_json: Annotated[bool, Flag, tyro.conf.arg(name="json")] = Field(False, description="report as JSON")


def run(options: Options) -> int:
    """The table on stdout, progress on stderr."""
    files = open_model(options.model) if options.model is not None else random_model(ThinkerConfig.model_validate({}))
    with Console(stderr=True).status("measuring") as status:
        report = measure(files, QUICK if options.quick else Patience(), lambda line: status.update(f"{line} …"))
        as_json = report.to_json()  # memory is read once more for these limits
    if options.as_json:
        print(to_json(as_json))
    else:
        show(report, Console(highlight=False))
    return 0


def show(report: Report, console: Console) -> None:
    """What a person reads."""
    machine = report.machine
    console.print(
        f"{machine['processor']}, {machine['cores']} cores ({machine['capability']}), torch {machine['torch']}",
        f"Products of matrices: {_products(report)} GFLOP/s",
        f"Reading memory: {_reading(report)}",
        f"\n{report.model}: {report.parameters:,} parameters",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in ("", "computed by", "tokens/s", "at best", "bound by", "share"):
        words = name in ("", "computed by")  # they go on in the next line where it is narrow, so that no digit is cut
        right = name in ("tokens/s", "at best", "share")
        table.add_column(name, justify="right" if right else "left", no_wrap=not words, overflow="fold")
    for speed in report.speeds:
        limit, bound = speed.limit(report.product_rates)
        table.add_row(speed.what, speed.how, f"{speed.rate:,.0f}", f"{limit:,.0f}", bound, f"{speed.rate / limit:.0%}")
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}", soft_wrap=True, markup=False)
    memory = ", ".join(f"{size / 1e6:,.0f} MB {when}" for when, size in report.peak_memory.items())
    console.print(f"Peak memory: {memory}")


def _products(report: Report) -> str:
    return ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in report.product_rates.items())


def _reading(report: Report) -> str:
    return ", ".join(f"{rate / 1e9:,.0f} GB/s within {size / 1e6:,.0f} MB" for size, rate in report.bandwidths.items())
