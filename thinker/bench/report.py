"""All measurements of `thinker bench`, in the order in which they disturb each other least, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np

from ..compiled.processor import processors
from ..config import ThinkerConfig
from ..formats import ModelFiles
from ..llm import LLM, NativeType
from . import costs, limits
from .speed import ROWS, STREAMS, TRAINED_LENGTH, Speed, speaking, training

Say = Callable[[str], None]
LONGEST_PROBE = 60.0  # seconds that choosing a precision for training may take


@dataclass(frozen=True)
class Patience:
    """Seconds for each kind of measurement, and whether to wait for the compiler, which takes about half a minute."""

    limit: float = 1.0
    speaking: float = 1.0
    training: float = 5.0
    compile: bool = True


QUICK = Patience(limit=0.2, speaking=0.1, training=0.1, compile=False)


@dataclass(frozen=True)
class Report:
    """Speeds and the limits they stand beside. Bandwidths in bytes, product rates in operations, both per second."""

    model: str
    parameters: int
    machine: dict[str, Any]
    product_rates: dict[str, float]
    bandwidths: dict[int, float]  # by how many bytes are read again and again
    speeds: tuple[Speed, ...]
    peak_memory: dict[str, int]  # bytes, after decoding natively if it could, and at the end
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object, with each speed's limit and share."""
        lines = []
        for speed in self.speeds:
            limit, bound = speed.limit(self.product_rates)
            lines.append(asdict(speed) | {"limit": limit, "bound": bound, "share": speed.rate / limit})
        return asdict(self) | {"speeds": lines}


def measure(files: ModelFiles, patience: Patience, say: Say) -> Report:
    """Measure everything about one model on the processor; `say` hears what is being done."""
    notes: list[str] = []
    # More is never asked for, and 32 caches of a long context fill any memory.
    files = replace(files, config=files.config.changed(ctx_len=min(TRAINED_LENGTH, files.config.ctx_len)))
    # Native decoding comes first, in a process without torch, as in `thinker generate`; so its memory is its own.
    speeds = list(_native(files, patience, say, notes))
    peak = {"decoding natively": limits.peak_memory()} if speeds else {}
    say("loading torch")
    from ..decode.torch_decoder import TorchDecoder

    decoder = TorchDecoder(LLM(files, "torch", "float32", 1, notes.append).model.to("cpu"), max(STREAMS))
    say("decoding in torch")
    speeds += speaking(decoder, "torch float32", "float32", patience.speaking)
    del decoder
    rates = _product_rates(patience, say)
    speeds += _training(files.config, rates["float32"], patience, say, notes)
    # Once more, since whatever else ran in that moment must not pass for the machine's limit.
    again = _product_rates(patience, say)
    rates = {dtype: max(rate, again[dtype]) for dtype, rate in rates.items()}
    peak["in all"] = limits.peak_memory()
    say("reading memory")
    sizes = (limits.last_level_cache() // 2, limits.BEYOND)
    return Report(
        str(files.path),
        files.config.parameter_count(),
        _machine(),
        rates,
        {size: limits.read_bandwidth(size, processors()) for size in sizes},
        tuple(speeds),
        peak,
        tuple(notes),
    )


def _native(files: ModelFiles, patience: Patience, say: Say, notes: list[str]) -> Iterator[Speed]:
    from ..decode.native import NativeUnavailable, open_native

    for dtype in get_args(NativeType):
        say(f"decoding natively, {dtype}")
        try:
            decoder = open_native(files, max(STREAMS), dtype)
        except NativeUnavailable as error:
            notes.append(f"not measured natively: {error}")
            return
        except ValueError as error:
            if dtype != "int8":
                raise
            notes.append(f"not measured natively in int8: {error}")  # not every model's sizes are multiples of 32
            continue
        if dtype == "int8":
            notes.append("native int8 multiplies whole numbers, and may pass what float32's products would allow")
        yield from speaking(decoder, f"native {dtype}", dtype, patience.speaking)
        # Said last, since the choice is made anew meanwhile, when it is in doubt.
        threads = f"{decoder.threads} thread{'s' if decoder.threads > 1 else ''}"
        notes.append(f"native {dtype} writes 1 stream with {threads} here, prompts and many streams with all there are")
        if decoder.has_drafts:
            notes.append(f"native {dtype} drafts what 1 stream writes, and may pass what is best for a token at a time")


def _product_rates(patience: Patience, say: Say) -> dict[str, float]:
    say("multiplying matrices")
    return {dtype: limits.product_rate(dtype, patience.limit) for dtype in ("float32", "bfloat16")}


def _training(config: ThinkerConfig, rate: float, patience: Patience, say: Say, notes: list[str]) -> Iterator[Speed]:
    import torch

    from ..train.decide import repeatable

    # Two steps of a row in each precision, at a quarter of the product rate at worst.
    length = min(TRAINED_LENGTH, config.ctx_len)
    probe = 4 * length * costs.training_flops(config, length) / (rate / 4)
    if probe > LONGEST_PROBE:
        notes.append(f"no training steps: a batch of {ROWS} x {length} would take minutes here")
        return
    with repeatable(None):
        for compiled in (False, True) if patience.compile else (False,):
            say("compiling a training step, about half a minute" if compiled else "training steps")
            try:
                yield training(config, compiled, patience.training)
            except ValueError as error:
                notes.append(str(error))
    torch.compiler.reset()


def _machine() -> dict[str, Any]:
    import torch

    from ..train.decide import versions

    return versions() | {
        "processor": limits.processor(),
        "cores": processors(),
        "torch_threads": torch.get_num_threads(),
        "numpy": np.__version__,
    }
