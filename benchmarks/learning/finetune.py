"""Rates for a model that knows something: stories first, then a little Shakespeare, at shares of the first rates.

    python -m benchmarks.learning.finetune [--seeds 0] [--before 250] [--after 80]

By characters, with nanoGPT's sizes. Both losses count: on the new text, and on the old one, which shows what was
forgotten. `--init` in `thinker/train/recipes.py` takes its share from here.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.data.sources import open_sources

from .nanogpt import ours
from .runs import Text, held_out, train

RESULTS = Path(__file__).parent / "finetune.json"
SHARES = (1.0, 0.3, 0.1, 0.03)
LITTLE = 60_000  # characters of the new text
MEASURED = 40_000  # held-out characters of each


def ascii_text(name: str, train_size: int) -> Text:
    """A named set by its characters' numbers, at most 127."""
    sides = ("".join("".join(d.read()) for d in open_sources((name,)).documents(side)) for side in ("train", "valid"))
    whole = (np.frombuffer(side.encode("ascii", "replace"), np.uint8).astype(np.uint16) for side in sides)
    return Text(*(side[:size] for side, size in zip(whole, (train_size, MEASURED), strict=True)))


def main() -> None:
    """Train once, then go on at each share of the rates."""
    parser = argparse.ArgumentParser(description="Rates for a model that knows something already.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--before", type=int, default=250, help="steps of 24 x 64 characters on stories")
    parser.add_argument("--after", type=int, default=80, help="steps on Shakespeare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old, new = ascii_text("tinystories", 2_000_000), ascii_text("tinyshakespeare", LITTLE)
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in options.seeds:
        base = ours(old, seed, options.before, compiled=False, vocab_size=128)
        before = train(base, "before").loss
        knows = copy.deepcopy(base.model.state_dict())
        for share in SHARES:
            run = ours(new, seed, options.after, False, vocab_size=128, lr=3e-3 * share, muon_lr=1e-2 * share)
            run.model.load_state_dict(knows)
            learned = train(run, "after").loss
            base.model.load_state_dict(run.model.state_dict())
            row = {"seed": seed, "share": share, "new": learned, "old": held_out(base), "old_before": before}
            results.append(row | {"before": options.before, "after": options.after})
            print(row, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: both losses at each share of the rates."""
    lines = ["| share of the rates | seeds | new text | old text | old text before |", "|---|---|---|---|---|"]
    for share in SHARES:
        rows = [one for one in results if one["share"] == share]
        if rows:
            means = (np.mean([one[key] for one in rows]) for key in ("new", "old", "old_before"))
            lines.append(f"| {share:g} | {len(rows)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
