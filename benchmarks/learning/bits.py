"""Bits per byte after ten minutes of the tiny configuration: AdamW with a cosine, tuned, and Thinker's recipe.

    python -m benchmarks.learning.bits [--data tinystories stdlib] [--share 0.25] [--seeds 0] [--sides NAME …]

Both sides have zero output projections, the same text and dropout, and where text is seen again the best of twelve
looks counts for both. AdamW has the network four times: with QK-norm, which the recipe chooses, and without it, as a
Llama, each also with embedding and head in one, as the recipe has them where text repeats.

A shared machine makes runs by the clock unfair, so each side gets the tokens that ten minutes give it: 6,500 tokens/s
for AdamW, and for Thinker's recipe less by the ratio of the two speeds, measured in turns. `--clock` trains each for
the minutes themselves. `--share` takes a part of the budget, `--sides` some of the sides, or other settings of them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.config import ThinkerConfig
from thinker.data.shards import Corpus, prepare
from thinker.train.config import TrainConfig
from thinker.train.held_out import LOOKS
from thinker.train.recipes import COOCCURRENCE, FROM_NOTHING, INHERIT, average_for, decay_for, dropout_for, lr_for, ties
from thinker.train.run import Run

from ..precision import fast
from . import pictures
from .runs import Text, rehearse, seconds_in_turns, train

HERE = Path(__file__).parent
RESULTS = HERE / "bits.json"
SECONDS = 600.0
ADAMW_TOKENS_PER_SECOND = 6500  # of the tiny configuration on the two quiet cores that the aims were set on
LOOKS_AT_NEW_TEXT = 5  # which only draw the curve
LOOK_TOKENS = 5000  # of a look along the way, about
ADAMW, OURS = "AdamW, cosine", "Thinker's recipe"
LLAMA = f"{ADAMW}, no QK-norm"
TIED, LLAMA_TIED = f"{ADAMW}, tied", f"{LLAMA}, tied"
UNCOUNTED = f"{OURS}: no co-occurrence"
WITHOUT = f"{UNCOUNTED}, no inheritance"
EARLIER = f"{WITHOUT}, lr 0.003"
TINY = ThinkerConfig.model_validate({"dropout": 0.0, "use_qk_norm": True})
Key = tuple[str, float, str]  # text, share, recipe

# As nanoGPT and many after it set AdamW; lr and rows are the best that were found, of those in `TUNED`.
PLAIN = {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05, "beta2": 0.95, "weight_decay": 0.1}
PLAIN |= {"lr": 8e-3, "batch_size": 4}
RECIPE = {"optimizer": "muon", "schedule": "linear", "warmup": 0.02, "batch_size": 4}
RECIPE |= {"muon_lr": FROM_NOTHING["muon_lr"], "inherit": INHERIT}
RECIPE |= {"cooccurrence": COOCCURRENCE}  # all else: by the tokens
BARE = PLAIN | {"use_qk_norm": False, "lr": 2e-3}
JOINED = PLAIN | {"tie_embeddings": True, "lr": 2e-3}
RANDOM = RECIPE | {"cooccurrence": 0}
BEFORE = RANDOM | {"inherit": 0.0, "lr": 3e-3}
SIDES: dict[str, dict[str, Any]] = {ADAMW: PLAIN, OURS: RECIPE, LLAMA: BARE}
SIDES |= {LLAMA_TIED: BARE | {"tie_embeddings": True}, TIED: JOINED}
TUNED: dict[str, dict[str, Any]] = {
    f"{LLAMA}: lr 0.004": BARE | {"lr": 4e-3},
    f"{LLAMA}: lr 0.008": BARE | {"lr": 8e-3},
    f"{LLAMA}: decay 1": BARE | {"weight_decay": 1.0},
    f"{TIED}: decay 1": JOINED | {"weight_decay": 1.0},
    f"{TIED}: decay 2": JOINED | {"weight_decay": 2.0},
    f"{TIED}: lr 0.0005": JOINED | {"lr": 5e-4},
    f"{TIED}: lr 0.001": JOINED | {"lr": 1e-3},
    f"{TIED}: lr 0.004": JOINED | {"lr": 4e-3},
    f"{TIED}: lr 0.008": JOINED | {"lr": 8e-3},
    "AdamW, cosine: 8 rows, lr 0.002": PLAIN | {"batch_size": 8, "lr": 2e-3},
    "AdamW, cosine: lr 0.002": PLAIN | {"lr": 2e-3},
    "AdamW, cosine: lr 0.004": PLAIN | {"lr": 4e-3},
    "AdamW, cosine: lr 0.016": PLAIN | {"lr": 1.6e-2},
    "AdamW, cosine: 2 rows, lr 0.004": PLAIN | {"batch_size": 2, "lr": 4e-3},
    "AdamW, cosine: warm-up 0.15": PLAIN | {"warmup": 0.15},
    f"{OURS}: tied": RECIPE | {"tie_embeddings": True},
    f"{OURS}: tied, lr 0.004": RECIPE | {"tie_embeddings": True, "lr": 4e-3},
    UNCOUNTED: RANDOM,
    f"{UNCOUNTED}, last weights": RANDOM | {"average": 0.0},
    f"{UNCOUNTED}, apart, last weights": RANDOM | {"average": 0.0, "tie_embeddings": False},
    f"{UNCOUNTED}, lr 0.003": RANDOM | {"lr": 3e-3},
    f"{UNCOUNTED}, lr 0.005": RANDOM | {"lr": 5e-3},
    f"{UNCOUNTED}, lr 0.008": RANDOM | {"lr": 8e-3},
    f"{UNCOUNTED}, lr 0.02": RANDOM | {"lr": 2e-2},
    WITHOUT: RANDOM | {"inherit": 0.0},
    EARLIER: BEFORE,
    f"{EARLIER}, no decay": BEFORE | {"weight_decay": 0.0},
    f"{EARLIER}, 8 rows": BEFORE | {"batch_size": 8},
    f"{WITHOUT}, lr 0.01": BEFORE | {"lr": 1e-2},
}


def contestant(corpus: Corpus, seed: int, chosen: dict[str, Any], tokens: float = 0) -> Run:
    """A run of the tiny configuration at step 0; dropout, and all else that is not set, are for so many tokens."""
    epochs = tokens / len(corpus.train)
    config = TINY.changed(vocab_size=corpus.tokenizer.vocab_size, dropout=dropout_for(epochs))
    if "weight_decay" not in chosen:  # the recipe's
        tied = chosen.get("tie_embeddings", ties(epochs))
        chosen = {"lr": lr_for(epochs, tied), "tie_embeddings": tied} | chosen
        steps = tokens / (chosen["batch_size"] * TINY.ctx_len)
        decay = decay_for(epochs, chosen["muon_lr"], steps)
        chosen = {"average": average_for(epochs), "weight_decay": decay} | chosen
    of_network = {name: value for name, value in chosen.items() if name in ThinkerConfig.model_fields}
    of_run = {name: value for name, value in chosen.items() if name not in of_network}
    settings = TrainConfig.model_validate({"batch_size": 8, "seed": seed} | of_run)
    text = Text(corpus.train, corpus.valid, corpus.tokenizer)
    return rehearse(config.changed(**of_network), settings, text, fast(), compiled=True)


def main() -> None:
    """Run what `bits.json` lacks, then print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(description="Bits per byte after ten minutes of the tiny configuration.")
    parser.add_argument("--data", nargs="+", default=["tinystories", "stdlib"])
    parser.add_argument("--share", type=float, default=1.0, help="of the ten minutes' tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    # Not --only: torch's compiler looks for that flag on any command line, and writes its value into code.
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=[*SIDES, *TUNED], metavar="NAME")
    parser.add_argument("--clock", action="store_true", help="by the clock instead of by tokens: for a quiet machine")
    parser.add_argument("--speeds", action="store_true", help="measure the ratio of the speeds again, in turns")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    corpora = {name: prepare((name,), "bpe", TINY.vocab_size, TINY.ctx_len + 1, print) for name in options.data}
    if options.speeds or "ratio" not in results:
        some = next(iter(corpora.values()))
        tokens = SECONDS * ADAMW_TOKENS_PER_SECOND
        pair = [contestant(some, 0, {"steps": 10_000} | chosen, tokens) for chosen in (PLAIN, RECIPE)]
        adamw, muon = seconds_in_turns(pair, rounds=6, steps=2)
        results |= {"ratio": adamw / muon, "seconds_a_step": {ADAMW: adamw, OURS: muon}, "precision": fast()}
        write(results)
    for seed in options.seeds:
        for data, corpus in corpora.items():
            for name in options.sides:
                chosen = (SIDES | TUNED)[name]
                key = {"name": name, "seed": seed, "data": data, "share": options.share, "clock": options.clock}
                if any(all(one[part] == value for part, value in key.items()) for one in results["runs"]):
                    continue
                if options.clock:
                    length: dict[str, Any] = {"minutes": SECONDS * options.share / 60}
                else:
                    speed = ADAMW_TOKENS_PER_SECOND * (results["ratio"] if chosen["optimizer"] == "muon" else 1)
                    step = chosen.get("batch_size", 8) * TINY.ctx_len
                    length = {"steps": round(SECONDS * options.share * speed / step)}
                # What Thinker's side sees; AdamW, whose steps are faster, sees more.
                tokens = SECONDS * options.share * ADAMW_TOKENS_PER_SECOND * results["ratio"]
                run = contestant(corpus, seed, chosen | length, tokens)
                repeats = tokens > len(corpus.train)
                sparse = max(1, len(corpus.valid) // LOOK_TOKENS)
                done = train(run, name, LOOKS if repeats else LOOKS_AT_NEW_TEXT, sparse, keep_best=repeats)
                bits = [look.loss / math.log(2) * corpus.tokens_per_byte for look in done.looks]
                print(f"{data}, {name}, seed {seed}: {bits[-1]:.4f} bits per byte, {done.looks[-1]}", flush=True)
                results["runs"].append(done.to_json() | key | {"precision": fast(), "bits_per_byte": bits})
                write(results)
    draw(results, options.share)
    print(table(results))


def write(results: dict[str, Any]) -> None:
    """After every run, so that nothing is lost."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def key_of(run: dict[str, Any]) -> Key:
    """Its text, share and recipe."""
    return run["data"], run["share"], run["name"]


def final_bits(results: dict[str, Any]) -> dict[Key, np.ndarray]:
    """Bits per byte at the end, of every seed."""
    bits: dict[Key, list[float]] = {}
    for one in results["runs"]:
        bits.setdefault(key_of(one), []).append(one["bits_per_byte"][-1])
    return {key: np.array(values) for key, values in bits.items()}


def best_of(bits: dict[Key, np.ndarray], data: str, share: float, rival: str) -> tuple[str, float] | None:
    """Of the recipes whose names begin so the best one's name and mean, if there is any."""
    means = {key[2]: values.mean() for key, values in bits.items() if key[:2] == (data, share)}
    return min(
        ((name, mean) for name, mean in means.items() if name.startswith(rival)), key=lambda p: p[1], default=None
    )


def draw(results: dict[str, Any], share: float) -> None:
    """Bits per byte against tokens, a picture a text, with the best of AdamW's whatever its settings."""
    for data in {one["data"] for one in results["runs"]}:
        runs = [
            one | {"looks": [look | {"loss": b} for look, b in zip(one["looks"], one["bits_per_byte"], strict=True)]}
            for one in results["runs"]
            if one["data"] == data and one["share"] == share
        ]
        best, _ = best_of(final_bits(results), data, share, ADAMW) or (ADAMW, 0)
        pictures.learning(
            HERE / f"bits_{data}.png",
            runs,
            list(dict.fromkeys([*SIDES, best])),
            "tokens",
            value="bits per byte of held-out text",
        )


def table(results: dict[str, Any]) -> str:
    """Markdown: every text, share and recipe, and how many bits fewer than the best that AdamW had there."""
    rivals = {"against the best AdamW": ADAMW, "against the best without QK-norm": LLAMA}
    head = ["text", "share of ten minutes", "recipe", "seeds", "tokens", "bits per byte", *rivals]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    bits = final_bits(results)
    tokens = {key_of(one): one["looks"][-1]["tokens"] for one in results["runs"]}
    for (data, share, name), values in sorted(bits.items()):
        spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
        seen = f"{tokens[data, share, name]:,}"
        cells = [data, f"{share:g}", name, str(len(values)), seen, f"{values.mean():.3f}{spread}"]
        for rival in rivals.values():
            best = best_of(bits, data, share, rival)
            cells.append(f"{values.mean() / best[1] - 1:+.1%}" if best else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
