"""One setting changed at a time around Thinker's recipe, at a share of nanoGPT's run; and what helps short text.

    python -m benchmarks.learning.sweeps [--seeds 0 1] [--steps 125] [--names NAME …]

What `thinker/train/recipes.py` chooses is argued from these. Differences within the spread of seeds say nothing. Where
text is short, the loss is measured twelve times, and what an early stop of any patience had come to is read from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.train.held_out import LOOKS
from thinker.train.recipes import FROM_NOTHING, summed

from ..precision import fast
from .nanogpt import characters, ours
from .runs import Text, train

RESULTS = Path(__file__).parent / "sweeps.json"
ROWS = 24  # of the recipe; others take as many steps as make the same number of tokens
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "AdamW 3e-3": {"optimizer": "adamw"},
    "without QK-norm": {"use_qk_norm": False},
    "muon_lr 0.005": {"muon_lr": 5e-3},
    "muon_lr 0.02": {"muon_lr": 2e-2},
    "lr 0.0015": {"lr": 1.5e-3},
    "lr 0.006": {"lr": 6e-3},
    "cosine": {"schedule": "cosine"},
    "wsd": {"schedule": "wsd"},
    "warm-up 0.1": {"warmup": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "weight decay 1.6": {"weight_decay": 1.6},
    "weight decay 4.8": {"weight_decay": 4.8},
    "β2 halving in 55,000 tokens": {"beta2": None, "beta2_tokens": 55_000.0},
    "12 rows": {"batch_size": 12},
    "6 rows": {"batch_size": 6},
    "48 rows": {"batch_size": 48},
    "ramp of a third": {"ramp": 1 / 3},
    "12 rows, lr 0.006": {"batch_size": 12, "lr": 6e-3},
    "12 rows, lr 0.01": {"batch_size": 12, "lr": 1e-2},
    "12 rows, lr 0.02": {"batch_size": 12, "lr": 2e-2},
    "12 rows, lr 0.006, muon_lr 0.015": {"batch_size": 12, "lr": 6e-3, "muon_lr": 1.5e-2},
    "12 rows, lr 0.02, muon_lr 0.015": {"batch_size": 12, "lr": 2e-2, "muon_lr": 1.5e-2},
    "12 rows, lr 0.006, wsd": {"batch_size": 12, "lr": 6e-3, "schedule": "wsd"},
    "12 rows, lr 0.006, wsd, cooldown 0.4": {"batch_size": 12, "lr": 6e-3, "schedule": "wsd", "cooldown": 0.4},
}
# Epochs over a beginning of the text, each with these dropouts; then with weight decay, given as what it adds up to: by
# e to the minus so much a weight that gets no update shrinks from the run's beginning to its end.
REPEATED = {
    f"{epochs} epochs, dropout {dropout:g}": (epochs, dropout, 0.0)
    for epochs in (3, 12, 40)
    for dropout in (0, 0.1, 0.2)
} | {
    f"{epochs} epochs, dropout {dropout:g}, decay {decay}": (epochs, dropout, decay)
    for epochs, dropout in ((3, 0), (12, 0.1), (40, 0.2))
    for decay in (1, 3, 9)
}
MEASURED = 20_000  # held-out characters of each of their looks
PATIENCE = (1, 2, 4)  # looks without a better one that a run of the above waits before it ends


def main() -> None:
    """Run what `sweeps.json` lacks and print the table."""
    parser = argparse.ArgumentParser(description="One setting changed at a time.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=125, help="of 24 rows of 64 characters")
    parser.add_argument("--names", nargs="+", default=[*CHANGES, *REPEATED], choices=[*CHANGES, *REPEATED])
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = characters()
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in options.seeds:
        for name in options.names:
            key = {"name": name, "seed": seed, "steps_of_24": options.steps}
            if any(all(one[part] == value for part, value in key.items()) for one in results):
                continue
            looks = LOOKS if name in REPEATED else 1
            done = train(variant(text, seed, options.steps, name), name, looks, sparse=1)
            row = {"loss": done.loss, "settings": done.settings, "seconds": done.looks[-1].seconds, "precision": fast()}
            results.append(key | row | {"looks": [look.loss for look in done.looks]})
            print(f"{name}, seed {seed}: {done.loss:.4f} in {done.looks[-1].seconds:.0f} s", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(stops(results))


def variant(text: Text, seed: int, steps: int, name: str) -> Any:
    """The run of that name."""
    if name in REPEATED:
        epochs, dropout, decay = REPEATED[name]
        size = steps * ROWS * 64 // epochs
        few = Text(text.train[:size], text.valid[:MEASURED])
        rates = {"lr": FROM_NOTHING["lr"]} if decay else {}
        weight_decay = decay / summed(FROM_NOTHING["muon_lr"], steps)
        return ours(few, seed, steps, compiled=False, dropout=dropout, weight_decay=weight_decay, **rates)
    changes = dict(CHANGES[name])
    steps = steps * ROWS // changes.get("batch_size", ROWS)
    if "ramp" in changes:
        # a third of the steps with a quarter and a half of the rows; the tokens they lack come as further steps
        ramp = round(steps * changes["ramp"])
        changes["ramp"] = ramp
        steps += round(ramp * (1 - (1 / 4 + 1 / 2) / 2))
    return ours(text, seed, steps, compiled=False, **changes)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean loss, spread, and the difference to the recipe's."""
    lines = ["| changed | characters | seeds | validation loss | against the recipe |", "|---|---|---|---|---|"]
    for steps in sorted({one["steps_of_24"] for one in results}):
        of_steps = [one for one in results if one["steps_of_24"] == steps]
        recipe = [one["loss"] for one in of_steps if one["name"] == "the recipe"]
        for name in [*CHANGES, *REPEATED]:
            losses = np.array([one["loss"] for one in of_steps if one["name"] == name])
            if not len(losses):
                continue
            spread = f" ({losses.min():.3f} to {losses.max():.3f})" if len(losses) > 1 else ""
            compared = recipe and name not in REPEATED and name != "the recipe"
            against = f"{losses.mean() - np.mean(recipe):+.3f}" if compared else ""
            lines.append(
                f"| {name} | {steps * ROWS * 64:,} | {len(losses)} | {losses.mean():.3f}{spread} | {against} |"
            )
    return "\n".join(lines)


def stops(results: list[dict[str, Any]]) -> str:
    """Markdown: the best loss and the share of the run until it ends, for each patience and without."""
    waits = [*PATIENCE, LOOKS]
    lines = [
        "| repeated text | seeds | last look | " + " | ".join(f"patience {wait}" for wait in PATIENCE) + " | no stop |",
        "|---|---|---|" + "---|" * len(waits),
    ]
    for name in REPEATED:
        curves = [one["looks"] for one in results if one["name"] == name and len(one.get("looks", ())) == LOOKS]
        if curves:
            ended = [np.mean([stopped(looks, wait) for looks in curves], axis=0) for wait in waits]
            cells = (f"{best:.3f} after {share:.0%}" for best, share in ended)
            last = np.mean([looks[-1] for looks in curves])
            lines.append(f"| {name} | {len(curves)} | {last:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stopped(looks: list[float], patience: int) -> tuple[float, float]:
    """The best loss before a run ends that waits so many looks for a better one, and the share of it that it takes."""
    best = 0
    for i, loss in enumerate(looks):
        if loss < looks[best]:
            best = i
        if i - best >= patience:
            break
    return looks[best], (i + 1) / len(looks)


if __name__ == "__main__":
    main()
