"""AdamW's rate beside weight decay, and inheritance, where text repeats: part of the stories, seen more than six times.

    python -m benchmarks.learning.repeated [--seeds 0] [--rates 0.003 …] [--inherit 0 0.5] [--shares 0.25 0.125]

Half the width and the context of the tiny configuration, dropout 0.1, and decay as `thinker/train/recipes.py` has it. A
share of the stories gets that share of the tokens, so that the number of steps changes and that of epochs doesn't.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.config import ThinkerConfig
from thinker.data.shards import Corpus, prepare
from thinker.train.config import TrainConfig
from thinker.train.held_out import LOOKS
from thinker.train.recipes import DECAY, FROM_NOTHING, INHERIT, summed
from thinker.train.run import Run

from ..precision import fast
from .runs import Text, rehearse, train

RESULTS = Path(__file__).parent / "repeated.json"
TOKENS = 3 << 20  # that all of the stories get, and parts of them a part of: some six epochs
ROWS = 4
MUON = FROM_NOTHING["muon_lr"]
NARROW = ThinkerConfig.model_validate({"d_model": 128, "ctx_len": 256, "dropout": 0.1, "use_qk_norm": True})


def main() -> None:
    """Run what `repeated.json` lacks and print the table."""
    parser = argparse.ArgumentParser(description="AdamW's rate, and inheritance, where text repeats.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.005, 0.01])
    parser.add_argument("--inherit", type=float, nargs="+", default=[0.0, INHERIT])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.125], help="of the stories, and of tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = prepare(("tinystories",), "bpe", NARROW.vocab_size, NARROW.ctx_len + 1, print)
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed, share, inherit, rate in product(options.seeds, options.shares, options.inherit, options.rates):
        key = {"lr": rate, "inherit": inherit, "share": share, "seed": seed}
        if any(all(one[part] == value for part, value in key.items()) for one in results):
            continue
        run = contestant(corpus, seed, share, rate, inherit)
        done = train(run, f"lr {rate:g}, inherit {inherit:g}", LOOKS, sparse=1, keep_best=True)
        bits = [look.loss / math.log(2) * corpus.tokens_per_byte for look in done.looks]
        row = {"steps": done.looks[-1].step, "precision": fast(), "bits_per_byte": bits}
        results.append(key | row | {"settings": done.settings})
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{share:g} of the stories, {done.name}, seed {seed}: {bits[-1]:.4f} bits per byte", flush=True)
    print(table(results))


def contestant(corpus: Corpus, seed: int, share: float, rate: float, inherit: float) -> Run:
    """The run with that rate and inheritance over that share of the stories, at step 0."""
    tokens = TOKENS * share
    text = Text(corpus.train[: int(len(corpus.train) * share)], corpus.valid, corpus.tokenizer)
    steps = round(tokens / (ROWS * NARROW.ctx_len))
    settings = TrainConfig(
        steps=steps,
        seed=seed,
        batch_size=ROWS,
        lr=rate,
        muon_lr=MUON,
        inherit=inherit,
        weight_decay=DECAY / summed(MUON, steps),
    )
    config = NARROW.changed(vocab_size=corpus.tokenizer.vocab_size)
    return rehearse(config, settings, text, fast(), compiled=True)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each share and inheritance, a column for each rate, the best look of each."""
    rates = sorted({one["lr"] for one in results})
    lines = [
        "| share of the stories | steps | inherit | seeds | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (4 + len(rates)) + "|",
    ]
    for share, inherit in sorted({(one["share"], one["inherit"]) for one in results}):
        runs = [one for one in results if (one["share"], one["inherit"]) == (share, inherit)]
        seeds = len({one["seed"] for one in runs})
        cells = []
        for rate in rates:
            bits = [one["bits_per_byte"][-1] for one in runs if one["lr"] == rate]
            cells.append(f"{np.mean(bits):.3f}" if bits else "")
        lines.append(f"| {share:g} | {runs[0]['steps']:,} | {inherit:g} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
