"""What a person types: lines with editing and history, and messages of several lines; or the lines of a pipe.

A line that ends in a backslash goes on in the next one, and so does everything between three quotes. What a message
means, `chat.py` knows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..places import cache_folder

QUOTES = '"""'
KEPT_LINES = 1000

Ask = Callable[[str], str]  # prompt to line; EOFError at the end


@dataclass(frozen=True)
class Entry:
    """A message, or a command such as /reset: one line that begins with a slash."""

    text: str
    is_command: bool = False

    @property
    def command(self) -> str:
        """The command's own word; of a message none."""
        return self.text.partition(" ")[0] if self.is_command else ""


def read_entry(ask: Ask) -> Entry | None:
    """The next message or command, None at the end of the input, which also ends an unfinished message."""
    try:
        line = ask("> ")
    except EOFError:
        return None
    if line.startswith("/"):
        return Entry(line.strip(), is_command=True)
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        if line.lstrip().startswith(QUOTES):
            line = line.lstrip().removeprefix(QUOTES)
            while not line.rstrip().endswith(QUOTES):
                lines.append(line)
                line = ask("… ")
            line = line.rstrip().removesuffix(QUOTES)
        else:
            while line.endswith("\\"):
                lines.append(line.removesuffix("\\"))
                line = ask("… ")
        lines.append(line)
    return Entry("\n".join(lines))


@contextmanager
def typed_lines(interactive: bool) -> Iterator[Ask]:
    """How lines are asked for: of a pipe, or of a person, with prompt_toolkit where it is installed, else readline.

    A person's lines are remembered from one session to the next, in the cache folder.
    """
    if not interactive:
        yield lambda prompt: input()
        return
    if not sys.stdout.isatty():
        yield _ask_on_stderr
        return
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError:
        with _readline_history(folder / "chat-history"):
            yield input
        return
    path = folder / "chat-history-prompt-toolkit"
    session: PromptSession[str] = PromptSession(history=FileHistory(path) if folder.is_dir() else InMemoryHistory())
    yield session.prompt


def _ask_on_stderr(prompt: str) -> str:
    """Where replies go to a file, the prompt must not stand among them."""
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


@contextmanager
def _readline_history(path: Path) -> Iterator[None]:
    try:
        import readline  # input() then edits lines and remembers them
    except ImportError:  # Windows has none
        yield
        return
    with contextlib.suppress(OSError):  # none yet, or of another library
        readline.read_history_file(path)
    readline.set_history_length(KEPT_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
