"""What a run decides about the machine it finds: device, precision, compiling, threads.

Each decision is made once, recorded in the run's exact state, and reused when it resumes: bit-for-bit repetition needs
the same ones. Timing is the only way to know whether a processor is fast in bfloat16, so that one is timed.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..compiled.processor import NEGLECTED, SLOW_PAIRS
from ..config import ThinkerConfig
from ..fused import attention, gating, kernels, norm
from ..loss import LossParts, NextTokenLoss
from .config import TrainConfig
from .senses import SplicedLoss

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Compiling takes some 25 to 60 seconds. A step then takes two thirds to three quarters of its time; beside kernels of
# our own, which leave less to compile, seven eighths in bfloat16, and in float32 nearly all (90 to 98 %).
COMPILE_PAYS_AFTER = 120.0  # seconds of training still to come
BESIDE_KERNELS: dict[Precision, float] = {"bfloat16": 200.0, "float32": 600.0}
COMPILED_GAIN = 1.5  # a compiled step against the eager one that was probed
GAIN_BESIDE_KERNELS: dict[Precision, float] = {"bfloat16": 8 / 7, "float32": 1 / 0.94}
TORCHS = "torch's"  # kernels, where there are none of our own
# Where a product takes so many times as long in bfloat16, a step gains nothing; where that is emulated, it takes ten
# times as long.
HOPELESS = 1.5


@dataclass(frozen=True)
class Decisions:
    """What holds for the whole run, with the reasons a person is shown."""

    device: str
    precision: Precision
    compile: bool
    threads: int
    seconds_per_step: float  # as probed, before compiling
    reasons: tuple[str, ...]
    versions: dict[str, str]
    split: int = 1  # parts that each of the batches is taken in; doubled when memory runs out

    def autocast(self) -> torch.autocast:
        """The context in which the forward runs."""
        dtype = DTYPES[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=self.precision != "float32")

    @property
    def compiled_gain(self) -> float:
        """How many steps to expect in the time of one that was probed."""
        if not self.compile:
            return 1.0
        beside_kernels = self.versions.get("kernels", TORCHS) != TORCHS
        return GAIN_BESIDE_KERNELS[self.precision] if beside_kernels else COMPILED_GAIN

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Decisions:
        """The decisions of an earlier process. Raises `ValueError` when this machine lacks the device."""
        if missing := {field.name for field in fields(cls)} - values.keys():
            raise ValueError(f"the state's decisions lack {', '.join(sorted(missing))}: take an older state")
        decisions = cls(**{**values, "reasons": tuple(values["reasons"])})
        check_device(decisions.device)
        return decisions


def choose_device(wanted: str) -> str:
    """The device by name; auto takes an accelerator when there is one."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(wanted)
    return "cpu" if torch.device(wanted).type == "cpu" else wanted


def check_device(name: str) -> None:
    """Raise `ValueError` unless the device exists here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which can't be used here ({reason}): choose cpu") from None


def decide(
    run: TrainConfig, module: NextTokenLoss | SplicedLoss, one_row: tuple[Tensor, ...], device: str
) -> Decisions:
    """Probe the machine with one row of a batch and settle everything that the run's settings leave open."""
    threads = torch.get_num_threads()
    reasons = []
    rows = run.batch_size * run.accumulate
    if run.precision != "auto":
        precision: Precision = run.precision
        seconds = rows * probe(module, one_row, device, precision)
    elif device != "cpu":
        older = torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported()
        precision = "float16" if older else "bfloat16"
        seconds = rows * probe(module, one_row, device, precision)
        reasons.append(f"{precision}: what this accelerator is built for")
    else:
        timed = {name: rows * probe(module, one_row, device, name) for name in worth_probing()}
        precision = min(timed, key=lambda name: timed[name])
        seconds = timed[precision]
        if len(timed) > 1:
            both = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in timed.items())
            reasons.append(f"{precision}: faster in a probe of two steps each ({both} a step)")
        else:
            reasons.append(f"float32: a product takes {bfloat16_cost():.1f} times as long in bfloat16 here")

    pays_after = COMPILE_PAYS_AFTER
    if wants_kernels(device, precision) and kernels.is_available(DTYPES[precision]):
        pays_after = BESIDE_KERNELS[precision]
    limit_steps, limit_seconds = run.limit
    ahead = limit_seconds if limit_seconds is not None else (limit_steps or 0) * seconds
    hindrance = missing_compiler(device)
    if module.model.config.use_moe and precision != "bfloat16":
        hindrance = "torch compiles the grouped products of a mixture in bfloat16 only"
    if isinstance(module, SplicedLoss):
        hindrance = "pictures and sounds come in other numbers with every batch"
    if run.compile == "auto":
        compiled = ahead > pays_after and hindrance is None
        reasons.append(
            f"{'compiled' if compiled else 'not compiled'}: {hindrance or f'the run lasts some {ahead:,.0f} s'}"
        )
    else:
        compiled = run.compile == "on"
        if compiled and hindrance is not None:
            raise ValueError(f"compile is 'on', but {hindrance}: use --compile off")
    if wants_kernels(device, precision):
        reasons.append(own_kernels(module.model.config, compiled))
    found = versions() | {"kernels": kernels_for(device, precision)}
    return Decisions(device, precision, compiled, threads, seconds, tuple(reasons), found)


def missing_compiler(device: str) -> str | None:
    """Why nothing can be compiled for a device, if so."""
    there = device != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None
    return None if there else "no C++ compiler (g++) was found"


def wants_kernels(device: str, precision: Precision) -> bool:
    """Whether a run in this precision is one of those that kernels of `fused/` are made for here."""
    dtype = DTYPES[precision]
    return device == "cpu" and dtype == kernels.numbers() and kernels.multiplies(dtype)


def kernels_for(device: str, precision: Precision) -> str:
    """Which kernels of `fused/` such a run has here: others round differently, or are torch's. May compile them."""
    if not wants_kernels(device, precision) or not kernels.is_available(DTYPES[precision]):
        return TORCHS
    return kernels.form() if precision == "bfloat16" else "float32 with products" if NEGLECTED else "float32"


def own_kernels(config: ThinkerConfig, compiled: bool) -> str:
    """What is done by kernels of `fused/` on a processor for which there are some."""
    hindrance = kernels.hindrance(kernels.numbers())
    if hindrance is not None:
        return f"kernels: torch's alone, for want of Thinker's own ({hindrance})"
    form = "" if kernels.form() == "none" else f" (products by {kernels.form()})"
    parts = {
        f"attention{form}": attention.fits(config.head_width),
        "norms": not compiled and norm.fits(config.d_model),
        "products": NEGLECTED,
        "weights' gradients": kernels.form() == "tiles",
        "activations": config.use_swiglu and config.activation_name == "silu" and gating.fits(config.d_ff),
    }
    return f"kernels: Thinker's own for {', '.join(name for name, there in parts.items() if there)} and the loss"


def worth_probing() -> tuple[Precision, ...]:
    """The precisions among which a probe decides on a processor: not bfloat16 where products are slow."""
    return ("float32", "bfloat16") if not SLOW_PAIRS and bfloat16_cost() < HOPELESS else ("float32",)


@cache
def bfloat16_cost() -> float:
    """How many times as long a product of matrices takes in bfloat16 as in float32, on this processor."""
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            times.append(time.perf_counter() - start)
        taken.append(min(times))
    return taken[1] / taken[0]


def probe(module: NextTokenLoss | SplicedLoss, batch: tuple[Tensor, ...], device: str, precision: Precision) -> float:
    """Seconds of one forward and backward, the faster of two. Neither parameters nor later draws change."""

    def once() -> float:
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "float32"):
            parts: LossParts = module(*batch)
        parts.total.backward()
        if device != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    with torch.random.fork_rng([]):  # an accelerator's is seeded for each step
        seconds = min(once(), once())
    module.zero_grad(set_to_none=True)
    return seconds


@contextmanager
def repeatable(threads: int | None) -> Iterator[None]:
    """Deterministic algorithms inside the block, and the number of threads; as it was before, after it."""
    # cuBLAS needs a workspace of fixed size to be deterministic, and reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
        torch.set_num_threads(before[2])


def dropout_seed(seed: int, step: int, micro: int, rank: int = 0) -> int:
    """One 63-bit number for all four, so that dropout depends on where it is drawn and on nothing before it."""
    return int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def versions() -> dict[str, str]:
    """What the bits of a run may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
