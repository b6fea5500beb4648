"""The shell: `thinker COMMAND …`, one file a command.

Each command's module has `Options`, a pydantic model whose fields are the flags, and `run(options)`, which returns the
exit status. It is imported when it is called, so that no command pays for another. This file turns every user's mistake
into one line on stderr and exit status 2.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from ..config import explain

COMMANDS = {
    "train": "train a model on text",
    "generate": "continue a text",
    "chat": "hold a conversation",
    "eval": "loss, perplexity and bits per byte of a text",
    "encode": "features of pictures and sounds, computed once",
    "export": "write a GGUF file for llama.cpp",
    "bench": "how fast this machine runs a model, beside its own limits",
    "doctor": "prove that a model computes the same wherever it runs",
}

USAGE = "usage: thinker COMMAND …\n\n" + "".join(f"  {name:10s} {what}\n" for name, what in COMMANDS.items())
INTERRUPTED = 130

Parsed = TypeVar("Parsed", bound=BaseModel)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit status: 0 done, 1 failed, 2 a user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    spin_briefly()
    open_what_is_closed()
    speak_utf8()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\n`thinker COMMAND --help` tells more.")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from .. import __version__

        print(__version__)
        sys.exit(0)
    if arguments[0] not in COMMANDS:
        fail(f"unknown command {arguments[0]!r}: choose among {', '.join(COMMANDS)}")
    try:
        command = importlib.import_module(f".{arguments[0]}", __package__)
        status = command.run(parse(command.Options, arguments[0], arguments[1:]))
        sys.stdout.flush()
    except ValidationError as error:
        fail(explain(error, f"thinker {arguments[0]}"))
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        abandon_stdout()  # the reader (`| head`) has what it wanted
        status = 0
    except (MemoryError, OSError, RuntimeError) as error:
        from ..train.allocator import ran_out_of_memory

        if ran_out_of_memory(error):
            fail(f"out of memory ({error}): free some, or take a smaller model, --ctx-len or batch")
        if not isinstance(error, OSError) or not error.strerror:
            raise
        if error.filename is not None:
            fail(f"{error.filename}: {error.strerror}")
        print(f"thinker: {error.strerror}", file=sys.stderr)  # a full disk, say: no mistake in what was typed
        abandon_stdout()
        status = 1
    sys.exit(status)


def open_what_is_closed() -> None:
    """Python has None in place of a standard stream that was closed, as a service's may be: to and from nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def speak_utf8() -> None:
    """Texts come and go as UTF-8, whatever the locale; bytes that are none are told of where a text is read.

    Until then, and in names of files, each is half a surrogate pair, and goes out as the byte that it was.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "surrogateescape"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):  # whoever calls `main` may have put something else in its place
            stream.reconfigure(encoding="utf-8", errors=errors)


def abandon_stdout() -> None:
    """Send the rest, if it can't be written, to nowhere: Python would complain once more while closing."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def spin_briefly() -> None:
    """Let OpenMP's threads watch for work for a fraction of a millisecond, then sleep. For before torch is imported.

    Threads that watch on and on, as they do by default, nearly halve the speed of training as soon as another program
    wants a core, which on a laptop is always; those that sleep at once take a fifth of it on an idle machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def parse(options: type[Parsed], command: str, arguments: Sequence[str]) -> Parsed:
    """The flags as an instance of `options`; every mistake in them is a `ValueError` of one line."""
    import tyro

    parser: Callable[..., Parsed] = tyro.cli
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = parser(
                options,
                prog=f"thinker {command}",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes,),
            )
        refuse_twice(options, arguments)
        return options.model_construct(_fields_set=_given(parsed, arguments), **dict(parsed))
    except ValidationError as error:
        raise ValueError(explain(error, f"thinker {command}")) from None
    except SystemExit as ending:
        if not ending.code:
            raise
    # tyro draws a box: title, what is wrong, a rule, help. The second part is the line a person needs.
    inside = [line.strip("│ ").strip() for line in complaint.getvalue().splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(inside) if set(line) == {"─"}), len(inside))
    said = " ".join(inside[:rule])
    if invalid := re.search(r"validation errors? for \w+ (\w+) (.*?) \[type=.*?input_value=(.*?), input_type", said):
        field, rule_broken, value = invalid.groups()
        said = f"--{field.replace('_', '-')} is {value}: {rule_broken[0].lower()}{rule_broken[1:]}"
    raise ValueError(f"{said} (see thinker {command} --help)")


def refuse_twice(options: type[BaseModel], arguments: Sequence[str]) -> None:
    """Raise `ValueError` for a flag of several values that is given twice: the first ones would be dropped in silence.

    Of a single value the last one counts, as everywhere, so that a script's flags can be overridden.
    """
    import tyro

    flags = _flags(arguments)
    for name, field in options.model_fields.items():
        several = get_origin(field.annotation) is tuple and tyro.conf.UseAppendAction not in field.metadata
        if several and flags.count(name) > 1:
            raise ValueError(f"--{name.replace('_', '-')} is given twice: give it once, with all its values behind it")


def _flags(arguments: Sequence[str]) -> list[str]:
    """The flags among the arguments, spelled as fields are; behind a lone -- there are none."""
    until = arguments.index("--") if "--" in arguments else len(arguments)
    flags = (argument.split("=")[0] for argument in arguments[:until] if argument.startswith("--"))
    return [flag.removeprefix("--").replace("-", "_") for flag in flags]


def _given(parsed: BaseModel, arguments: Sequence[str]) -> set[str]:
    """The fields that the person named, or gave by place; tyro fills in the rest and no longer tells which."""
    flags = _flags(arguments)
    named = {*flags, *(flag.removeprefix("no_") for flag in flags)}
    fields = type(parsed).model_fields
    return {name for name in fields if name in named or getattr(parsed, name) != fields[name].default}


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print(f"thinker: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
