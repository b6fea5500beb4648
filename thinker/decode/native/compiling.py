"""The disk cache of compiled kernels: which folder, and how Numba is told of it.

Numba notices a change of the function it caches, not of what that function calls in other files. So the folder's name
is a hash of all sources that kernels are made of, of the versions that compile them, and of the processor.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba import cfunc, njit, types


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


@contextmanager
def _keeping() -> Iterator[bool]:
    """Have Numba keep on disk what is declared in here; False if there is nowhere to write."""
    folder, before = cache_folder(), numba.config.CACHE_DIR
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    numba.config.CACHE_DIR = str(folder)
    try:
        yield writable
    finally:
        numba.config.CACHE_DIR = before


def cached(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called."""
    with _keeping() as writable:
        return njit(cache=writable, error_model="numpy")(function)


class CFunction:
    """A function of so many int64 and without a result, compiled when its address is first asked for."""

    def __init__(self, function: Callable[..., None], arguments: int) -> None:
        self.function, self.signature = function, types.void(*[types.int64] * arguments)

    @cached_property
    def compiled(self) -> Any:
        """What keeps the code alive."""
        with _keeping() as writable:
            return cfunc(self.signature, cache=writable, error_model="numpy")(self.function)

    @property
    def address(self) -> int:
        """Where the code is."""
        address: int = self.compiled.address
        return address


def c_function(arguments: int) -> Callable[[Callable[..., None]], CFunction]:
    """Make a function a `CFunction`."""
    return lambda function: CFunction(function, arguments)
