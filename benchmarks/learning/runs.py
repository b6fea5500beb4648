"""One training run in memory, step by step through the loop's own `take_step`, with looks at held-out text.

Nothing is saved and no sample is drawn. What is trained, on what and how, the yardsticks say.
"""

# N tokens of a text

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.checkpoint.publish import Publication
from thinker.config import ThinkerConfig
from thinker.data.batches import Windows
from thinker.data.shards import Corpus
from thinker.model import ThinkerLM
from thinker.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from thinker.train.config import TrainConfig
from thinker.train.cooccurrence import begin_from_neighbours
from thinker.train.decide import Decisions, Precision, versions
from thinker.train.loop import step_module, take_step, warm_up
from thinker.train.optim import rate
from thinker.train.run import Run
from thinker.train.start import assemble

ROWS_AT_ONCE = 64  # of a look
SPARSE = 8  # looks along the way take one window in so many, unless a yardstick says otherwise


@dataclass(frozen=True)
class Text:
    """Tokens to train on and tokens held out, (N,) each."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: Tokenizer | None = None  # what they are the ids of, for runs that ask


@dataclass(frozen=True)
class Look:
    """The loss on held-out text, nats per token, after so many steps: all of it at the end, a part along the way."""

    step: int
    tokens: int
    seconds: float  # spent in steps
    loss: float


@dataclass(frozen=True)
class Outcome:
    """A finished run: its looks, the last of them at the end."""

    name: str
    seed: int
    settings: dict[str, Any]
    parameters: int
    looks: list[Look]
    state_of: int  # the step whose state the last look measured

    @property
    def loss(self) -> float:
        """At the end."""
        return self.looks[-1].loss

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def rehearse(
    config: ThinkerConfig, settings: TrainConfig, text: Text, precision: Precision = "float32", compiled: bool = False
) -> Run:
    """A run of Thinker's network at step 0, nothing of it on disk."""
    torch.manual_seed(settings.seed)
    model = ThinkerLM(config)
    if settings.cooccurrence:
        begin_from_neighbours(model, text.train, settings.cooccurrence)
    return prepared(model, config, settings, text, precision, compiled)


def prepared(
    model: ThinkerLM, config: ThinkerConfig, settings: TrainConfig, text: Text, precision: Precision, compiled: bool
) -> Run:
    """A run of any network that has Thinker's two methods, `features` and `head`."""
    tokenizer = text.tokenizer or Tokenizer.train(["abc"], SMALLEST_VOCABULARY, "char")
    corpus = Corpus("in memory", "", Path("."), tokenizer, text.train, text.valid, 1, 1, 0, 0)
    batches = corpus.batches(settings.batch_size * settings.accumulate, config.ctx_len, settings.seed, settings.ramp)
    decisions = Decisions("cpu", precision, compiled, torch.get_num_threads(), 0.0, (), versions())
    return assemble(Path("."), config, settings, decisions, corpus, model, batches, Publication())


def train(run: Run, name: str, looks: int = 1, sparse: int = SPARSE, keep_best: bool = False) -> Outcome:
    """All of a run, by steps or by the clock, with so many looks spread evenly; the last is at the end.

    With `keep_best` it measures the state that was best along the way, as a run that repeats its text publishes it.
    """
    settings = run.settings
    best, state_of, state = math.inf, 0, {}
    module = step_module(run)
    seen: list[Look] = []
    if run.decisions.compile:
        warm_up(run, module)  # compiling is no learning
    while (progress := run.progress()) < 1:
        start = time.perf_counter()
        share = rate(progress, schedule=settings.schedule, warmup=settings.warmup, cooldown=settings.cooldown)
        take_step(run, module, share)
        run.count(run.batches.tokens_in(run.step), time.perf_counter() - start)
        if int(min(run.progress(), 1) * looks) > int(progress * looks):
            ended = run.progress() >= 1
            with run.shown():
                loss = held_out(run, 1 if ended and not keep_best else sparse)
                if loss < best or not keep_best:
                    best, state_of = loss, run.step
                    state = copy.deepcopy(run.model.state_dict()) if keep_best else {}
            if ended and keep_best:
                run.model.load_state_dict(state)
                loss = held_out(run)
            seen.append(Look(run.step, run.tokens, run.seconds, loss))
    chosen = settings.model_dump(mode="json", exclude_none=True)
    return Outcome(name, settings.seed, chosen, sum(p.numel() for p in run.model.parameters()), seen, state_of)


@torch.no_grad()
def held_out(run: Run, every: int = 1) -> float:
    """Mean loss over the held-out tokens of one window in `every`, in float32, each with its window before it."""
    assert isinstance(run.corpus, Corpus)
    windows = Windows(run.corpus.valid, run.config.ctx_len)
    run.model.eval()
    total, tokens = 0.0, 0
    chosen = range(0, len(windows), every)
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        rows = windows[chosen[start : start + ROWS_AT_ONCE]]
        parts = run.module(*map(torch.from_numpy, rows))
        total, tokens = total + float(parts.total), tokens + int(parts.tokens)
    run.model.train()
    return total / tokens


def seconds_in_turns(runs: Sequence[Run], rounds: int, steps: int) -> list[float]:
    """Median seconds a step of each run, taken in turns, so that a busy machine is as busy for all.

    On one thread they are the processor's, which waiting for a busy core doesn't add to.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for times, run in zip(taken, runs, strict=True):
            module = step_module(run)
            start = clock()
            for _ in range(steps):
                take_step(run, module, 0.1)
                run.step += 1
            times.append((clock() - start) / steps)
    return [float(np.median(times[1:])) for times in taken]  # the first round warms up
