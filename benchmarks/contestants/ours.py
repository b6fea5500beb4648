"""Thinker, as `thinker train` and `thinker generate` run it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import numba
import numpy as np

import thinker
from thinker.bench import costs
from thinker.bench.speed import practice, some_tokens, trainer
from thinker.bench.speed import prefill as prefill_seconds
from thinker.commands import spin_briefly
from thinker.compiled.processor import processors
from thinker.config import ThinkerConfig
from thinker.decode.decoder import Decoder
from thinker.decode.native import open_native
from thinker.formats import open_model
from thinker.llm import LLM, NativeType
from thinker.sampling import Draws, Sampling

from . import Ready


def train(architecture: dict[str, Any], settings: dict[str, Any]) -> Ready:
    """Whole training steps: batch, forward, backward, clipping, optimiser; deterministic, as always."""
    spin_briefly()
    import torch

    from thinker.train.config import TrainConfig
    from thinker.train.decide import repeatable

    config = ThinkerConfig.model_validate({"dropout": 0.0} | architecture)
    chosen = TrainConfig.model_validate({"steps": 1_000_000} | settings)
    with repeatable(None):
        run = practice(config, chosen)
        step = trainer(run)

    def turn() -> float:
        with repeatable(None):
            return step()

    about = {
        "thinker": thinker.__version__,
        "torch": torch.__version__,
        "threads": run.decisions.threads,
        "optimizer": chosen.optimizer,
        "parameters": config.parameter_count(),
    }
    return Ready(turn, chosen.batch_size * config.ctx_len, about)


def decode(
    model: str,
    dtype: NativeType,
    streams: int = 1,
    prompt: int = 16,
    new: int = 256,
    backend: Literal["native", "torch"] = "native",
    drafts: bool = True,
    **sampling: Any,
) -> Ready:
    """Prompts of `prompt` tokens and `new` tokens after each; everything counts, prefill too."""
    decoder, about = _open(model, dtype, streams, backend, drafts)
    tokens, slots = some_tokens(decoder.config, prompt), np.arange(streams)
    draws = Draws(streams, decoder.config.vocab_size)

    def turn() -> float:
        start = time.perf_counter()
        last = np.zeros(streams, np.int64)
        for slot in range(streams):
            decoder.truncate(slot, 0)
            logits = decoder.prefill(slot, tokens)
            draws.begin(slot, Sampling(**sampling), slot, tokens)
            last[slot] = draws.draw([slot], logits[None])[0]
        decoder.run(slots, last, draws, new - 1)
        return time.perf_counter() - start

    return Ready(turn, streams * new, about)


def prefill(model: str, dtype: NativeType, length: int = 500) -> Ready:
    """A prompt of `length` tokens."""
    decoder, about = _open(model, dtype, 1)
    return Ready(partial(prefill_seconds, decoder, length), length, about)


def next_token(model: str, dtype: NativeType, context: int, cached: bool) -> Ready:
    """One more token behind `context` others: from the cache, or computing them all again."""
    # Of the cache alone: both with all threads, whatever either would choose.
    decoder, about = _open(model, dtype, 1, threads=processors())
    tokens = some_tokens(decoder.config, context)
    decoder.prefill(0, tokens)
    draws = Draws(1, decoder.config.vocab_size)

    def turn() -> float:
        decoder.truncate(0, context - 1 if cached else 0)
        start = time.perf_counter()
        if cached:
            decoder.run([0], tokens[-1:], draws)
        else:
            draws.draw([0], decoder.prefill(0, tokens)[None])
        return time.perf_counter() - start

    return Ready(turn, 1, about)


def _open(
    model: str,
    dtype: NativeType,
    slots: int,
    backend: str = "native",
    drafts: bool = True,
    threads: int | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    files = open_model(model)
    cached = "float16" if dtype == "int8" else "float32"
    about = {"thinker": thinker.__version__, "weights": dtype, "keys and values": cached}
    if backend == "torch":
        import torch

        llm = LLM(files, "torch", dtype, slots, print)
        return llm.decoder, about | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    decoder = open_native(files, slots, dtype, threads, drafts)
    size = costs.cache_bytes(files.config, dtype) * files.config.ctx_len
    mine = {"threads for one stream": decoder.threads, "bytes of keys and values": size}
    return decoder, about | {"numba": numba.__version__} | mine
