"""The disk cache of compiled kernels: which folder, and how Numba is told of it.

Numba notices a change of the function it caches, not of what that function calls in other files. So the folder's name
is a hash of all sources that kernels are made of, of the versions that compile them, and of the processor.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba import njit


def cache_folder() -> Path:
    """$THINKER_CACHE or the user's cache folder, with a name that changes with sources, versions and processor."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), here.parents[1] / "sampling.py"]:
        digest.update(source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, sys.version, binding.get_host_cpu_name())
    digest.update(repr((versions, binding.get_host_cpu_features().flatten())).encode())
    return user_cache() / f"kernels-{digest.hexdigest()[:16]}"


def user_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    if "THINKER_CACHE" in os.environ:
        return Path(os.environ["THINKER_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "thinker"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "thinker"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thinker"


def cached(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, keeping the result on disk where that is possible."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_folder())
    try:
        return njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to write: compile anew each time
        return njit(error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
