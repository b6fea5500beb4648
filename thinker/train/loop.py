"""The one training loop.

A step is: batch k as a function of the seed and k, forward and backward for each micro-batch, one clip, one update.
What a run consists of and how it is saved is in `train/run.py`; what a person sees of it, in `train/report.py`.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.publish import repair
from ..loss import IGNORE, LossParts
from .allocator import ran_out_of_memory
from .decide import dropout_seed
from .held_out import look, look_is_due
from .optim import rate, set_beta2, set_rate
from .run import OutOfMemory, Run

Halved = Callable[[Run], None]  # told when a batch was too large for the memory


class Diverged(Exception):
    """The loss or the gradient is NaN or infinite; the message says where and what to try."""


@dataclass(frozen=True)
class StepReport:
    """What one step came to."""

    step: int  # steps done, this one included
    loss: float  # nats per token, before the step
    balance: float
    grad_norm: float  # before clipping
    lr: float
    tokens: int
    seconds: float
    progress: float  # share of the run that is done


class Watcher(Protocol):
    """Who is told how training goes. Time spent in these calls doesn't count as training."""

    def compiling(self, run: Run) -> None:
        """Called before the step is compiled, which takes about half a minute."""

    def out_of_memory(self, run: Run) -> None:
        """Called when a batch was too large and has been halved."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Called after every step."""

    def validate(self, run: Run) -> None:
        """Called when it is time to look at held-out text."""


@dataclass
class Interruption:
    """The signal that asked the run to end, if one did."""

    signal: int | None = None


@contextmanager
def until_interrupted() -> Iterator[Interruption]:
    """Let the step at hand finish after the first Ctrl-C or SIGTERM; the second one ends at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # Only the main thread may set signal handlers.
        yield interruption
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if interruption.signal is not None:
            raise KeyboardInterrupt
        interruption.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keeping_steps(run: Run) -> Iterator[None]:
    """Have what was trained saved when memory runs out: nothing of a step that fails so has changed a parameter."""
    try:
        yield
    except OutOfMemory as error:
        if run.step in (0, run.saved):
            raise
        run.save()
        raise OutOfMemory(f"{error}; {run.folder} keeps the {run.step:,} steps until then") from None


def fit(run: Run, watcher: Watcher) -> int | None:
    """Train until the run's limit and save. Returns the signal that ended it early, None when it is complete.

    Raises `Diverged` without saving what has become useless, `OutOfMemory` after saving.
    """
    settings = run.settings
    module = step_module(run)
    saved = validated = run.seconds
    rows = None  # of the micro-batches that the step is compiled for
    start = 0.0

    def halved(run: Run) -> None:
        """In the midst of a step: what it is compiled for now is compiled outside the run's clock too."""
        nonlocal start
        watcher.out_of_memory(run)
        if run.decisions.compile:
            watcher.compiling(run)
            warm_up(run, module, watcher.out_of_memory)
            start = time.perf_counter()

    with until_interrupted() as interruption, keeping_steps(run):
        while (progress := run.progress()) < 1 and interruption.signal is None and not run.overfits:
            if run.decisions.compile and _micro_rows(run) != rows:  # at first, and at a ramp's next stage
                watcher.compiling(run)
                torch.compiler.reset()  # A process that resumes compiles for the new shape alone, and so must this one.
                warm_up(run, module, watcher.out_of_memory)
                rows = _micro_rows(run)
            start = time.perf_counter()
            share = rate(progress, schedule=settings.schedule, warmup=settings.warmup, cooldown=settings.cooldown)
            tokens = run.batches.tokens_in(run.step)
            loss, balance, norm = take_step(run, module, share, halved)
            elapsed = time.perf_counter() - start
            rows = _micro_rows(run)  # memory may have run out
            run.count(tokens, elapsed)
            report = StepReport(
                run.step, loss, balance, norm, share * settings.lr, tokens, elapsed, min(1.0, run.progress())
            )
            watcher.after_step(run, report)
            # A run that has a best state publishes that, so it goes on looking for a better one.
            steered = settings.early_stop > 0 or run.best is not None
            found_best = False
            if steered and look_is_due(progress, run.progress()):
                with run.shown():
                    found_best = look(run)
            if (found_best or run.seconds - saved >= settings.save_every) and run.progress() < 1:
                run.save()
                saved = run.seconds
            if run.looked_at_this_step if steered else run.seconds - validated >= settings.validate_every:
                with run.shown():
                    watcher.validate(run)
                validated = run.seconds
        if run.saved != run.step:
            run.save()
        else:
            repair(run.folder)
    return interruption.signal


def step_module(run: Run) -> Callable[..., LossParts]:
    """What a step calls: the module, compiled if that was decided."""
    if not run.decisions.compile:
        return run.module
    # Generated C++ may round a product and a sum once, as matrix products do: 2 % of a step.
    return torch.compile(run.module, dynamic=False, options={"cpp.enable_floating_point_contract_flag": "fast"})


def warm_up(run: Run, module: Callable[..., LossParts], halved: Halved = lambda run: None) -> None:
    """Compile forward and backward on the next batch, outside the run's clock; parameters stay as they are."""
    within_memory(run, module, run.batches.batch(run.step), halved)
    run.module.zero_grad(set_to_none=True)


def take_step(
    run: Run, module: Callable[..., LossParts], share: float, halved: Halved = lambda run: None
) -> tuple[float, float, float]:
    """One update at this share of the peak rates: loss per token, balance loss, norm of the gradient."""
    settings = run.settings
    batch = run.batches.batch(run.step)  # inputs, targets, and segments where rows are packed
    loss, balance = within_memory(run, module, batch, halved)
    taught = [one for one in run.optimizers if has_gradients(one)]  # a scaler refuses the others
    for optimizer in taught:
        run.scaler.unscale_(optimizer)
    norm = clip(run.trained.parameters(), settings.clip)
    # With float16 a scaler skips steps whose scaled gradient overflowed; that is no divergence.
    if not math.isfinite(loss) or not (math.isfinite(norm) or run.scaler.is_enabled()):
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.3f}, but its gradient {norm}"
        raise Diverged(
            f"step {run.step + 1}: {what} at learning rates {share * settings.lr:.2g} (AdamW) and "
            f"{share * settings.muon_lr:.2g} (Muon): try half of them, a longer --warmup, or --precision float32"
        )
    set_rate(run.optimizers, share)
    set_beta2(run.optimizers, settings.adam_beta2(batch[0].size))
    for optimizer in taught:
        run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    if taught:
        run.scaler.update()
    return loss, balance, norm


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything that an optimiser trains had a part in the loss."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale all gradients by one factor so that their common norm is at most this (arXiv 1211.5063); what it was."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # Row by row: a whole tensor is summed up by one thread. What may stay as it is isn't written again.
    rows = [torch.linalg.vector_norm(parameter.grad, dim=-1) for parameter in trained]
    norm = torch.nn.utils.get_total_norm(rows)
    if not norm <= most:  # NaN too
        torch.nn.utils.clip_grads_with_norm_(trained, most, norm)
    return float(norm)


def within_memory(
    run: Run, module: Callable[..., LossParts], batch: tuple[np.ndarray, ...], halved: Halved
) -> tuple[float, float]:
    """The gradients of a step's batch, its loss and balance loss per token.

    Where memory runs out in the forward or backward, half the rows go at once from there on, and `halved` is told.
    """
    counted = int((batch[1] != IGNORE).sum())
    while (sums := _try_gradients(run, module, batch, counted)) is None:
        run.halve()
        if run.decisions.compile:
            torch.compiler.reset()  # A process that resumes compiles for the new shape alone, and so must this one.
        halved(run)
    total, balance = sums
    return float(total) / counted, float(balance) / counted


def _try_gradients(
    run: Run, module: Callable[..., LossParts], batch: tuple[np.ndarray, ...], counted: int
) -> tuple[Tensor, Tensor] | None:
    """As `gradients`; None, and no gradients, when there isn't memory enough."""
    try:
        return gradients(run, module, batch, counted)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    # Out here the error is gone, and with it its frames, which hold the activations.
    run.module.zero_grad(set_to_none=True)
    if torch.device(run.decisions.device).type == "cuda":
        torch.cuda.empty_cache()
    return None


def gradients(
    run: Run, module: Callable[..., LossParts], batch: tuple[np.ndarray, ...], counted: int
) -> tuple[Tensor, Tensor]:
    """Forward and backward of every micro-batch: the sums of the losses and of the balance losses, times tokens."""
    total = balance = torch.zeros((), device=run.decisions.device)
    micro_batches = zip(*(_split(rows, run) for rows in batch), strict=True)
    for micro, rows in enumerate(micro_batches):
        torch.manual_seed(dropout_seed(run.settings.seed, run.step, micro))
        with run.decisions.autocast():
            parts = module(*rows)
        # Sums over the step's tokens, so that ragged micro-batches weigh as one batch would.
        objective = (parts.total + run.config.balance_loss * parts.balance * parts.tokens) / counted
        if objective.requires_grad:  # nothing does in text where senses alone are trained
            run.scaler.scale(objective).backward()
        total = total + parts.total.detach()
        balance = balance + parts.balance.detach() * parts.tokens
    return total, balance


def _split(rows: np.ndarray, run: Run) -> Iterator[Tensor]:
    for part in np.array_split(rows, _parts(run, len(rows))):
        yield torch.from_numpy(part).to(run.decisions.device)


def _parts(run: Run, rows: int) -> int:
    """How many micro-batches a step of so many rows takes: a ramp's smaller ones fewer, each as large as ever."""
    return -(-rows * run.micro_batches // (run.settings.batch_size * run.settings.accumulate))


def _micro_rows(run: Run) -> int:
    """Rows of the next step's largest micro-batch."""
    rows = run.batches.rows_in(run.step)
    return -(-rows // _parts(run, rows))
