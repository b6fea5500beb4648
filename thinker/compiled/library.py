"""Kernels on disk: compiled with Numba when there are none for this processor, and loaded with LLVM's linker alone.

Importing Numba takes longer than all else that one answer needs, so what is loaded here is the bare object file. It
depends on the kernel's sources, on the compiler's versions and on the processor, whose hash is in its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..places import cache_folder
from .processor import processors

if TYPE_CHECKING:
    from llvmlite import binding

HERE = Path(__file__).parent
COMPILERS = ("numba", "llvmlite")
RUNTIME = b"NRT_"  # what the names of its functions begin with


class Kernel:
    """A compiled function of so many int64 (numbers, addresses) that returns one; called with Python's lock held.

    `module` holds it as plain Python, and is only imported to compile it; `sources` are all files that it is made of.
    """

    def __init__(self, module: str, name: str, arguments: int, sources: Sequence[Path]) -> None:
        self.module, self.name, self.arguments, self.sources = module, name, arguments, sources
        self._lock = threading.Lock()
        self._engine: binding.ExecutionEngine | None = None  # keeps the code in memory

    def __call__(self, *arguments: int) -> int:
        result, error = ctypes.c_int64(), ctypes.c_void_p()
        status = self._function(ctypes.byref(result), ctypes.byref(error), *arguments)
        assert status == 0, (self.name, status)
        return result.value

    def prepare(self) -> int:
        """Compile or load it, unless that is done: where the code is, which follows Numba's calling convention."""
        with self._lock:
            if self._engine is None:
                self._engine, self._address = load(*self._code())
            return self._address

    @property
    def is_kept(self) -> bool:
        """Whether it has been compiled before. Raises `ImportError` without a compiler."""
        return self._file.exists()

    @cached_property
    def _function(self) -> Callable[..., int]:
        pointers = [ctypes.c_void_p] * 2
        kind = ctypes.PYFUNCTYPE(ctypes.c_int32, *pointers, *[ctypes.c_int64] * self.arguments)
        return kind(self.prepare())

    @cached_property
    def _file(self) -> Path:
        from llvmlite import binding

        digest = hashlib.sha256(self.module.encode())
        for source in [*sorted(HERE.glob("*.py")), *sorted(self.sources)]:
            digest.update(source.read_bytes())
        versions = [sys.version, *map(importlib.metadata.version, COMPILERS), binding.get_host_cpu_name()]
        digest.update(repr((versions, binding.get_host_cpu_features().flatten())).encode())
        return cache_folder() / "kernels" / f"{self.name}-{digest.hexdigest()[:16]}"

    def _code(self) -> tuple[str, bytes]:
        """Its symbol and its object file, from the disk, or made and put there if that can be written."""
        with contextlib.suppress(OSError, ValueError):
            return unpack(self._file.read_bytes())
        function = getattr(importlib.import_module(self.module), self.name)
        symbol, code = compile_kernel(function, self.arguments)
        # Parts of it that somebody called by themselves before call Numba's runtime, which is in this process alone.
        if RUNTIME not in code:
            with contextlib.suppress(OSError):
                keep(self._file, pack(symbol, code))
        return symbol, code


def compile_missing(kernels: Sequence[Kernel]) -> None:
    """Compile those that aren't on disk, the first one here and the others meanwhile, in processes of their own.

    A compiler uses one processor. What fails elsewhere is left to whoever wants the kernel.
    """
    missing = [kernel for kernel in kernels if not kernel.is_kept]
    many = min(processors(), len(missing)) - 1
    if many < 1 or not sys.executable or not _may_be_written(cache_folder()):
        return
    others: list[subprocess.Popen[bytes]] = []
    try:
        with contextlib.suppress(OSError):
            for i in range(many):
                others.append(_begin_to_compile(missing[1 + i :: many]))
        missing[0].prepare()
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.kill()
            other.wait()


def _begin_to_compile(kernels: Sequence[Kernel]) -> subprocess.Popen[bytes]:
    """A process that compiles these, one after another, and keeps them."""
    made = [(kernel.module, kernel.name, kernel.arguments, list(map(str, kernel.sources))) for kernel in kernels]
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        f"from {__name__} import Kernel\n"
        "for *function, sources in json.loads(sys.argv[1]):\n"
        "    Kernel(*function, list(map(Path, sources))).prepare()\n"
    )
    nothing, found = subprocess.DEVNULL, os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, json.dumps(made)]
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, env=found)


def _may_be_written(folder: Path) -> bool:
    """Whether files can be put into a folder, which may not be there yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def compile_kernel(function: Callable[..., Any], arguments: int) -> tuple[str, bytes]:
    """The symbol of a function of int64 and the object file that defines it. What Numba can't compile, it raises."""
    from numba import types
    from numba.core import compiler
    from numba.core.registry import cpu_target

    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    result = compiler.compile_extra(
        cpu_target.typing_context,
        cpu_target.target_context,
        function,
        (types.int64,) * arguments,
        types.int64,
        flags,
        {},
    )
    _, _, (code, _) = result.library.serialize_using_object_code()
    return result.fndesc.llvm_func_name, code


def keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def load(symbol: str, code: bytes) -> tuple[binding.ExecutionEngine, int]:
    """Link an object file into this process: what keeps it there, and the symbol's address."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, engine.get_function_address(symbol)


def pack(symbol: str, code: bytes) -> bytes:
    """A file: one line of JSON, then the object file."""
    head = {"symbol": symbol, "sha256": checksum(symbol, code)}
    return json.dumps(head).encode() + b"\n" + code


def unpack(content: bytes) -> tuple[str, bytes]:
    """Back again. Raises `ValueError` for a file that was damaged: code is run only as it was written."""
    line, _, code = content.partition(b"\n")
    head = json.loads(line)
    symbol = head.get("symbol") if isinstance(head, dict) else None
    if not isinstance(symbol, str) or head["sha256"] != checksum(symbol, code):
        raise ValueError("the kernel on disk is damaged")
    return symbol, code


def checksum(symbol: str, code: bytes) -> str:
    """Of both: a call by a wrong name would go anywhere."""
    return hashlib.sha256(symbol.encode() + code).hexdigest()
