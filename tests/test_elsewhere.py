"""Kernels compile for processors that this one isn't, where an instruction that they lack would end the process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

# Instructions, and what is printed: the numbers that are trained in, and how many kernels there are for them.
OTHERS = {
    "haswell": ("avx2 fma f16c", "torch.float32 8\n"),
    "znver2": ("avx2 fma f16c", "torch.float32 9\n"),
    "skylake-avx512": ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "torch.float32 8\n"),
    "znver4": (
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni avx512bf16",
        "torch.bfloat16 10\n",
    ),
    "emeraldrapids": (  # whose system keeps the tiles to itself
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni avx512bf16",
        "torch.float32 8\n",
    ),
    "sapphirerapids": (
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni avx512bf16 amx-tile amx-bf16",
        "torch.bfloat16 11\n",
    ),
}

COMPILE = """
import importlib, os, sys
features = sys.argv[2].split()
os.environ |= {"NUMBA_CPU_NAME": sys.argv[1], "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features)}
from llvmlite import binding
binding.get_host_cpu_features = lambda: dict.fromkeys(features, True)
binding.get_host_cpu_name = lambda: sys.argv[1]
from thinker.compiled.library import compile_kernel
from thinker.decode.native.kernels import product
from thinker.fused import kernels
for kernel in (*kernels.KERNELS[kernels.numbers()], product):
    symbol, code = compile_kernel(getattr(importlib.import_module(kernel.module), kernel.name), kernel.arguments)
    assert symbol and code
print(kernels.numbers(), len(kernels.KERNELS[kernels.numbers()]))
"""


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    """Bug: a kernel that is made of tiles is wanted where there are none: LLVM then ends the process.

    Of decoding's kernels only the product is compiled, whose form depends most on the processor.
    """
    from llvmlite import binding

    if not binding.get_default_triple().startswith("x86_64") or sys.platform != "linux":
        pytest.skip("these kernels are for Linux on x86-64")

    def compiled(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMPILE, name, OTHERS[name][0]]
        return subprocess.run(command, capture_output=True, text=True, timeout=500)

    with ThreadPoolExecutor() as pool:
        for (name, (_, printed)), done in zip(OTHERS.items(), pool.map(compiled, OTHERS), strict=True):
            assert done.stdout == printed, f"{name}: {done.stderr[-2000:]}"
