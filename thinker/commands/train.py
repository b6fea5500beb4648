"""`thinker train`: from a text to a model, with what a person sees before, during and after."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, Field, create_model
from rich.console import Console
from rich.markup import escape

from ..checkpoint.files import to_json
from ..config import ThinkerConfig
from ..train.config import TrainConfig, read_settings
from ..train.recipes import CHOSEN
from .flags import Flag

SAVED_AND_ENDED = {signal.SIGINT: 130, signal.SIGTERM: 143}


class OwnOptions(BaseModel):
    """Train a model: CONFIG.json, flags over it, and sensible values for the rest."""

    file: tyro.conf.Positional[Path | None] = Field(None, description="a configuration; comments are allowed")
    resume: bool = Field(False, description="go on from the newest state in OUT")
    dry_run: Annotated[bool, Flag] = Field(False, description="only tell size, memory and time; 1 if it doesn't fit")
    memory: str | None = Field(None, description="with --dry-run: the memory to fit, as 12GB; unset means what is free")
    json_report: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print the report as JSON")


def _flags() -> dict[str, Any]:
    """Every field of the run and of the architecture, without the rules between fields: a file may settle those."""
    fields = TrainConfig.model_fields | ThinkerConfig.model_fields
    by_recipe = tyro.conf.arg(help_behavior_hint="(default: the recipe's choice)")
    return {
        name: (Annotated[field.annotation, by_recipe] if name in CHOSEN else field.annotation, field)
        for name, field in fields.items()
        if name != "rope_scaling"
    }


Options = create_model("Options", __base__=OwnOptions, __doc__=OwnOptions.__doc__, **_flags())


def run(options: OwnOptions) -> int:
    """Train, report, and say what to do next.

    Exit status 0, 1 when the run diverged or a dry run does not fit, 130 or 143 when interrupted.
    """
    from ..checkpoint.training import latest
    from ..train.chat_summary import summarise_chats
    from ..train.decide import repeatable
    from ..train.loop import Diverged, fit
    from ..train.report import Reporter
    from ..train.start import begin, resume
    from ..train.summary import summarise

    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    own = set(OwnOptions.model_fields)
    flags = {name: getattr(options, name) for name in options.model_fields_set - own}
    config, settings, given = read_settings(options.file, flags)
    if options.dry_run:
        return _dry_run(options, config, settings, given)
    if options.memory is not None:
        raise ValueError(f"--memory {options.memory} is for --dry-run: add it, or drop --memory")
    began = time.monotonic()
    with repeatable(settings.threads):
        if options.resume:
            training = resume(config, settings, given, say)
        else:
            training = begin(config, settings, given, say)
        say(f"{training.config.parameter_count():,} parameters, to {training.folder}/")
        try:
            with Reporter(training, console) as reporter:
                ended_by = fit(training, reporter)
        except (Diverged, OSError) as error:  # a full disk, say
            console.print(f"[bold red]stopped:[/] {escape(str(error))}", soft_wrap=True)
            kept = latest(training.folder)
            if kept is not None:
                say(f"The last good state is kept in {kept}.")
            return 1
        if ended_by is not None:
            folder = shlex.quote(str(training.folder))
            say(f"Saved at step {training.step:,}. To go on: thinker train --resume --out {folder}")
            return SAVED_AND_ENDED[signal.Signals(ended_by)]
        training.take_published(say)
        give_account = summarise_chats if training.settings.chat else summarise
        report = give_account(training, reporter.rows, console, time.monotonic() - began)
    if options.json_report:
        print(to_json(report))
    return 0


def _dry_run(options: OwnOptions, config: ThinkerConfig, settings: TrainConfig, given: set[str]) -> int:
    """The report on stdout, progress on stderr; 1 when the run does not fit."""
    from ..train.decide import repeatable
    from ..train.dry_run import dry_run, read_size, show

    if options.resume:
        raise ValueError("--dry-run is about a new run: drop --resume")
    memory = None if options.memory is None else read_size(options.memory)
    console = Console(stderr=True, highlight=False)
    with repeatable(settings.threads), console.status("preparing") as status:
        report = dry_run(config, settings, given, memory, lambda line: status.update(f"{line} …"))
    if options.json_report:
        print(to_json(report.to_json()))
    else:
        show(report, Console(highlight=False))
    return 0 if report.fits else 1
