"""The loss on held-out text while a run goes on, and what it steers: which state is the best, and whether to end early.

Looks that steer come at fixed shares of the run, so that a run of `--steps` repeats and resumes bit for bit. Those that
only show how it goes come by the clock, in `train/loop.py`.
"""

from __future__ import annotations

import numpy as np
import torch

from .run import Best, Run

LOOKS = 12  # that steer a run
LOOK_TOKENS = 1 << 16  # held-out tokens per look; the whole text is evaluated at the end


def look_is_due(before: float, after: float) -> bool:
    """Whether a look lies between two shares of the run that are done; the last one is at its end."""
    return int(min(after, 1.0) * LOOKS) > int(before * LOOKS)


def look(run: Run) -> bool:
    """Measure, and remember the step if it is the best one so far; whether it is."""
    loss = held_out_loss(run)
    if run.best is None or loss < run.best.loss:
        run.best = Best(run.step, loss)
        return True
    run.best = Best(run.best.step, run.best.loss, run.best.looks_since + 1)
    return False


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Mean loss in nats per token over evenly spread windows of the held-out text, or its replies."""
    if run.looked is not None and run.looked[0] == run.step:
        return run.looked[1]
    windows = run.corpus.windows(run.config.ctx_len)
    count = min(len(windows), max(1, LOOK_TOKENS // run.config.ctx_len))
    chosen = np.linspace(0, len(windows) - 1, count).astype(int).tolist()
    run.module.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(chosen), run.rows_at_once):
        rows = windows[chosen[start : start + run.rows_at_once]]
        with run.decisions.autocast():
            parts = run.module(*(torch.from_numpy(part).to(run.decisions.device) for part in rows))
        total += float(parts.total)
        tokens += int(parts.tokens)
    run.module.train()
    run.looked = (run.step, total / tokens)
    return total / tokens
