"""How fast this machine runs one model: prefill, decoding, training steps, each with what the work costs.

The limits that a speed is compared with are measured in `limits.py`, its costs computed in `costs.py`; the table is
`commands/bench.py`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..compiled.processor import processors
from ..config import ThinkerConfig
from ..decode.decoder import Decoder
from ..formats import ModelFiles
from ..formats.tensors import parameter_shapes
from ..sampling import Draws
from . import costs, limits

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from ..train.run import Run

STREAMS = (1, 8, 32)
PROMPT, NEW, FEW = 16, 128, 8  # tokens: decoding begins behind a prompt and goes on for so long
PREFILL = 500
TRAINED_LENGTH = 512  # tokens in a row of a training batch, at most
ROWS = 8


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one kind of work, and what a token costs."""

    what: str
    how: str
    rate: float
    flops: float  # a token
    products: Literal["float32", "bfloat16"]  # the product rate that bounds it
    step_bytes: float = 0.0  # read in one step, over and over; 0 where memory is no bound
    step_tokens: int = 1

    def limit(self, product_rates: dict[str, float]) -> tuple[float, str]:
        """Tokens per second that the machine's limits would allow, and the closest: memory, or products in a type."""
        allowed: dict[str, float] = {self.products: product_rates[self.products] / self.flops}
        if self.step_bytes:
            # Measured on so many bytes, as these may or may not fit into a cache.
            bandwidth = limits.read_bandwidth(round(self.step_bytes), processors())
            allowed["memory"] = bandwidth / self.step_bytes * self.step_tokens
        bound = min(allowed, key=lambda name: allowed[name])
        return allowed[bound], bound


def random_weights(config: ThinkerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of an architecture; its logits vary by a few units, as a trained model's do."""
    draws = np.random.default_rng(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            scale = 2 if name == "head.weight" else 1
            tensors[name] = draws.standard_normal(shape, np.float32) * np.float32(scale / shape[-1] ** 0.5)
    return tensors


def random_model(config: ThinkerConfig) -> ModelFiles:
    """An architecture with random weights, as if opened from a disk."""
    return ModelFiles(config, random_weights(config), Path("random weights"), "float32")


def typical(turn: Callable[[], float], seconds: float) -> float:
    """The median of what `turn` says it took, over as many turns as `seconds` allow, after one that doesn't count."""
    turn()
    began = time.perf_counter()
    times = [turn()]
    while time.perf_counter() - began < seconds:
        times.append(turn())
    return statistics.median(times)


def speaking(decoder: Decoder, how: str, dtype: str, seconds: float) -> Iterator[Speed]:
    """Prefill and decoding with as many streams as the decoder has slots for."""
    config = decoder.config
    length = min(PREFILL, config.ctx_len)
    flops = costs.prefill_flops(config, length) / length
    rate = length / typical(partial(prefill, decoder, length), seconds)
    yield Speed(f"prefill, {length} token{'s' if length > 1 else ''}", how, rate, flops, "float32")
    for streams in (count for count in STREAMS if count <= decoder.slots):
        start = min(PROMPT, config.ctx_len // 2)
        new = min(NEW, config.ctx_len - start)
        # A first few tokens warm up, and tell how many a turn can have where this takes long.
        few = min(FEW, new)
        new = max(few, min(new, int(seconds / 2 * few / decode(decoder, streams, start, few))))
        rate = streams * new / typical(partial(decode, decoder, streams, start, new), seconds)
        context = start + (new + 1) / 2  # a token sees itself
        read = costs.decode_bytes(config, dtype, streams, context)
        what = f"decode, {streams} stream{'s' if streams > 1 else ''}"
        yield Speed(what, how, rate, costs.decode_flops(config, context), "float32", read, streams)


def prefill(decoder: Decoder, length: int) -> float:
    """Seconds for a prompt of so many tokens in slot 0."""
    tokens = some_tokens(decoder.config, length)
    decoder.truncate(0, 0)
    start = time.perf_counter()
    decoder.prefill(0, tokens)
    return time.perf_counter() - start


def decode(decoder: Decoder, streams: int, prompt: int, new: int) -> float:
    """Seconds for `new` greedy tokens in each of so many slots, behind a prompt that is prefilled before."""
    draws = Draws(decoder.slots, decoder.config.vocab_size)
    tokens = some_tokens(decoder.config, prompt)
    for slot in range(streams):
        decoder.truncate(slot, 0)
        if prompt:  # a context of one token has no room for any
            decoder.prefill(slot, tokens)
    slots, last = np.arange(streams), np.resize(tokens, streams)  # of none zeros
    start = time.perf_counter()
    decoder.run(slots, last, draws, new)
    return time.perf_counter() - start


def some_tokens(config: ThinkerConfig, count: int) -> np.ndarray:
    """Random ids, always the same."""
    return np.random.default_rng(1).integers(0, config.vocab_size, count)


def practice(config: ThinkerConfig, settings: TrainConfig) -> Run:
    """A training run on random tokens, in memory: what `thinker train` would do on this machine, but for the text."""
    import torch

    from ..checkpoint.publish import Publication
    from ..data.batches import Batches
    from ..data.shards import Corpus
    from ..loss import NextTokenLoss
    from ..model import ThinkerLM
    from ..tokenizer import SMALLEST_VOCABULARY, Tokenizer
    from ..train.decide import choose_device, decide
    from ..train.start import assemble

    device = choose_device(settings.device)
    rows = settings.batch_size * settings.accumulate
    tokens = some_tokens(config, 4 * rows * config.ctx_len + 1)
    tokenizer = Tokenizer.train(["abc"], SMALLEST_VOCABULARY, "char")
    corpus = Corpus("random tokens", "", Path("."), tokenizer, tokens, tokens, 1, 1, 0, 0)
    torch.manual_seed(settings.seed)
    model = ThinkerLM(config).to(device)
    batches = Batches(tokens, rows, config.ctx_len, settings.seed)
    inputs, targets = (torch.from_numpy(part[:1]).to(device) for part in batches.batch(0))
    decisions = decide(settings, NextTokenLoss(model), (inputs, targets), device)
    return assemble(Path("."), config, settings, decisions, corpus, model, batches, Publication())


def trainer(run: Run) -> Callable[[], float]:
    """Steps of a run, one a call, with its optimiser and all: seconds of each. Compiled if the run decided so."""
    from ..train.loop import step_module, take_step

    module = step_module(run)

    def step() -> float:
        start = time.perf_counter()
        take_step(run, module, share=0.1)
        run.step += 1
        return time.perf_counter() - start

    return step


def training(config: ThinkerConfig, compiled: bool, seconds: float) -> Speed:
    """Training steps with the settings of `thinker train`, without dropout. Raises `ValueError` if it can't compile."""
    from ..train.config import TrainConfig

    config = config.changed(dropout=0.0, ctx_len=min(TRAINED_LENGTH, config.ctx_len))
    chosen = {"steps": 1000, "batch_size": ROWS, "device": "cpu", "compile": "on" if compiled else "off"}
    run = practice(config, TrainConfig.model_validate(chosen))
    rate = ROWS * config.ctx_len / typical(trainer(run), seconds)
    how = f"{run.decisions.precision} {'compiled' if compiled else 'eager'}"
    products: Literal["float32", "bfloat16"] = "float32" if run.decisions.precision == "float32" else "bfloat16"
    flops = costs.training_flops(config, config.ctx_len)
    return Speed(f"training, {ROWS} x {config.ctx_len}", how, rate, flops, products)
