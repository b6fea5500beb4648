"""Kernels on disk: compiled once, loaded without Numba, never run when damaged or out of date."""

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from thinker.compiled import library
from thinker.compiled.library import Kernel, pack, unpack

SOURCE = """
from thinker.compiled.memory import floats

def weighted(address, count, factor):
    x = floats(address, 0, count)
    total = 0
    for i in range(count):
        x[i] = x[i] * 2
        total += int(x[i]) * factor
    return total
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """make(source): a kernel of a module of its own with that source; its cache is tmp_path / "cache"."""
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source=SOURCE, module="kernel_under_test"):
        path = tmp_path / f"{module}.py"
        path.write_text(source)
        sys.modules.pop(module, None)
        return Kernel(module, "weighted", 3, [path])

    return make


def answer(kernel):
    x = np.array([1, 2, 3], np.float32)
    return kernel(x.ctypes.data, 3, 10), x.tolist()


def test_a_kernel_computes_and_is_kept(kernel, monkeypatch):
    """Bug: arguments or results in the wrong place, or every process compiles again."""
    first = kernel()
    assert not first.is_kept
    assert answer(first) == (120, [2.0, 4.0, 6.0])
    again = kernel()
    assert again.is_kept
    monkeypatch.setattr(library, "compile_kernel", None)
    assert answer(again) == (120, [2.0, 4.0, 6.0])


def test_a_changed_source_is_compiled_again(kernel):
    """Bug: yesterday's machine code runs under today's source."""
    assert answer(kernel())[0] == 120
    assert answer(kernel(SOURCE.replace("total += int", "total -= int")))[0] == -120


def test_functions_of_one_name_are_told_apart(kernel):
    """Bug: of two modules that share their sources one runs the other's function."""
    first = kernel()
    second = kernel(SOURCE.replace("total += int", "total -= int"), "another_under_test")
    first.sources = second.sources = [*first.sources, *second.sources]
    assert [answer(one)[0] for one in (first, second)] == [120, -120]


def test_damaged_code_is_never_run(kernel, tmp_path):
    """Bug: half a file, or one with a flipped bit, is linked and called."""
    answer(kernel())
    (file,) = (tmp_path / "cache" / "kernels").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    renamed = whole.replace(b'"symbol": "', b'"symbol": "x')
    for damaged in (b"", b"{}", b"no json\n", whole[: len(whole) // 2], bytes(flipped), renamed):
        with pytest.raises(ValueError):
            unpack(damaged)
        file.write_bytes(damaged)
        assert answer(kernel())[0] == 120
        assert len(unpack(file.read_bytes())[1]) > 100
    assert unpack(pack("name", b"code\nwith lines")) == ("name", b"code\nwith lines")


def test_a_folder_that_cannot_be_written_is_no_hindrance(kernel, tmp_path, monkeypatch):
    """Bug: no answer at all on a full or read-only disk."""
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "a_file"))
    assert answer(kernel())[0] == 120


def test_a_full_disk_is_not_filled_further(kernel, tmp_path, monkeypatch):
    """Bug: every start leaves another half file, which nobody removes."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library.os, "replace", full)
    one = kernel()
    assert answer(one)[0] == 120
    assert not one.is_kept
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_threads_that_begin_together_share_one_kernel(kernel, monkeypatch):
    """Bug: each thread compiles for itself, or one runs code that another is still linking."""
    compiled, shared, answers = [], kernel(), []
    honest = library.compile_kernel

    def counted(*arguments):
        compiled.append(arguments)
        return honest(*arguments)

    monkeypatch.setattr(library, "compile_kernel", counted)
    threads = [threading.Thread(target=lambda: answers.append(answer(shared)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [120] * 4
    assert len(compiled) == 1


def test_speaking_needs_no_numba_once_kernels_are_kept():
    """Bug: an import brings Numba back, which takes longer than everything else that one answer needs."""
    program = (
        "import sys\n"
        "from thinker.decode.native.kernels import ALL\n"
        "import thinker.decode.native.decoder, thinker.generate, thinker.llm, thinker.commands.generate\n"
        "for kernel in ALL:\n"
        "    assert kernel.prepare()\n"
        "print('numba' in sys.modules, 'torch' in sys.modules)\n"
    )
    for _ in range(2):  # the first may have to compile
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_what_only_this_process_can_run_is_not_kept(tmp_path):
    """Bug: a part that was called by itself brings in calls of Numba's runtime, of which the next process dies."""
    program = (
        "import numpy as np\n"
        "from thinker.sampling import draw_rows\n"
        "from thinker.sampling_kernels import kth_largest, pick\n"
        "weights = np.arange(50, dtype=np.int32)\n"
        "kth_largest(weights, np.int32(49), np.int64(5), weights.copy())\n"
        "pick(weights, weights, np.int64(1), np.int64(50), np.uint64(5))\n"
        "assert draw_rows.prepare()\n"
        "print(draw_rows.is_kept)\n"
    )
    environment = os.environ | {"THINKER_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.split() == ["False"], done.stderr


def test_several_are_compiled_side_by_side(kernel, monkeypatch):
    """Bug: whoever wants three waits three times as long, or gets another's, or one that this process doesn't find."""
    monkeypatch.setattr(library, "processors", lambda: 3)
    begun, compiled = [], []
    begin, compile_kernel = library._begin_to_compile, library.compile_kernel
    monkeypatch.setattr(library, "_begin_to_compile", lambda some: begun.append(len(some)) or begin(some))
    monkeypatch.setattr(library, "compile_kernel", lambda *what: compiled.append(what) or compile_kernel(*what))
    first, *others = (kernel(SOURCE.replace("* 2", f"* {i}"), f"kernel_{i}") for i in (2, 3, 4, 5))
    library.compile_missing([first, *others])
    assert begun == [2, 1]
    assert len(compiled) == 1, "the others were compiled elsewhere"
    assert all(one.is_kept for one in (first, *others))
    monkeypatch.setattr(library, "compile_kernel", None)
    assert [answer(one)[1][0] for one in (first, *others)] == [2, 3, 4, 5]


def test_what_fails_elsewhere_is_compiled_here(kernel, tmp_path, monkeypatch):
    """Bug: a machine that can't start a second process, or has no room on its disk, has no kernels."""
    monkeypatch.setattr(library, "processors", lambda: 2)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    pair = [kernel(), kernel(SOURCE.replace("* 2", "* 3"), "another_under_test")]
    library.compile_missing(pair)
    assert [one.is_kept for one in pair] == [True, False]
    assert answer(pair[1])[1][0] == 3
    monkeypatch.setattr(library, "_begin_to_compile", None)  # where nothing can be kept, it would be in vain
    (tmp_path / "file").touch()
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "file"))
    alone = kernel(SOURCE.replace("* 2", "* 4"), "third_under_test")
    library.compile_missing([alone, kernel(module="fourth_under_test")])
    assert answer(alone)[1][0] == 4
