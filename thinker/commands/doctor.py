"""`thinker doctor MODEL`: the certificate, each line with its figure, its tolerance, and pass or fail."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..certificate import Check, certify, describe, load_short
from ..checkpoint.files import to_json
from .flags import Flag
from .generate import notice


class Options(BaseModel):
    """Prove that a model computes the same however and wherever it runs. Exit status 1 when a check fails."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    as_json: Annotated[bool, Flag, tyro.conf.arg(name="json")] = Field(False, description="report as JSON")


def run(options: Options) -> int:
    """Issue the certificate on stdout; 1 when a check fails."""
    _, llm = load_short(options.model, notice)
    console = Console(stderr=True, highlight=False)
    with console.status("opening") as status:
        checks = certify(llm, lambda line: status.update(line))
    failed = [check for check in checks if check.passed is False]
    if options.as_json:
        report = {"model": options.model, "passed": not failed, "checks": [dataclasses.asdict(c) for c in checks]}
        print(to_json(report))
    else:
        show(f"{options.model}: {describe(llm.config)}", checks)
    return 1 if failed else 0


def show(title: str, checks: list[Check]) -> None:
    """The checks as a table on stdout, under a title that stays one line."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "figure", "tolerance", "", ""):
        table.add_column(column, justify="right" if column in ("figure", "tolerance") else "left", no_wrap=bool(column))
    verdicts = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]–[/]"}
    for check in checks:
        figures = ("" if value is None else written(value) for value in (check.figure, check.tolerance))
        table.add_row(check.name, *figures, verdicts[check.passed], f"[dim]{escape(check.note)}[/]")
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a pipe or a file has no width of its own
    console.print(escape(title), style="italic", soft_wrap=True)
    console.print(table)


def written(value: float) -> str:
    """Counts in full, differences in three digits."""
    return f"{value:,.0f}" if value.is_integer() and value < 1e12 else f"{value:.2e}"
