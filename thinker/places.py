"""Paths: as people write them, and where Thinker keeps what it can fetch or make again (downloads, tokens, kernels).

Of that only the folder's path: whoever keeps something there makes the folder, and names, checks and removes what is in
it. Nothing but the standard library is imported, so that every room below may ask.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """A path as a person wrote it: `~` and `~name` are home folders; what only looks like one stays, and is a file."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where all of that is kept: THINKER_CACHE, or a folder of the user's cache."""
    if chosen := os.environ.get("THINKER_CACHE"):
        return expand_home(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "thinker"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "thinker"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinker"
