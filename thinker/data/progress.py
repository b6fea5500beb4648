"""The bar that is shown while bytes of text are read, fetched, tokenised or evaluated.

One that counts bytes, on stderr, and stays away from short work. What training shows is no concern of this room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def byte_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown once the work has taken a second; yields a function that adds bytes."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    task = progress.add_task(title, total=total)
    began = time.monotonic()

    def advance(count: int) -> None:
        progress.update(task, advance=count)
        if not progress.live.is_started and time.monotonic() - began > 1:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
