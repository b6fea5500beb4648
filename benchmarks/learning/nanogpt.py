"""nanoGPT's run on a processor, its own recipe and ours on the same tokens.

    python -m benchmarks.learning.nanogpt [--seeds 0 1 2 3 4] [--names NAME …]

Tiny Shakespeare by characters, the first 90 % to train; 4 layers, 4 heads, d_model 128, context 64; 1.54 million
characters: 2,000 steps of 12 rows there. The loss at the end is over the whole validation text, along the way over one
window in eight. Both sides go through the same `take_step`, compiled, on one thread. Runs that `nanogpt.json` has are
not run again; the pictures and the printed table are made from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinker.config import ThinkerConfig
from thinker.data.sources import open_sources
from thinker.train.config import TrainConfig
from thinker.train.recipes import LR_ON_NEW_TEXT
from thinker.train.run import Run

from ..precision import fast
from . import gpt2, pictures
from .runs import Text, prepared, rehearse, seconds_in_turns, train

HERE = Path(__file__).parent
RESULTS = HERE / "nanogpt.json"
SIZES = {"n_layers": 4, "n_heads": 4, "d_model": 128, "ctx_len": 64, "dropout": 0.0}
NANOGPT = "nanoGPT's recipe"
OURS = "Thinker's recipe"
OURS_SHORT = "Thinker's recipe, an eighth of the tokens"
LOOKS = 10


def characters() -> Text:
    """The text as nanoGPT has it: 65 characters, numbered in their order."""
    source = open_sources(("tinyshakespeare",))
    train_text, valid_text = ("".join("".join(d.read()) for d in source.documents(side)) for side in ("train", "valid"))
    number = {character: i for i, character in enumerate(sorted(set(train_text + valid_text)))}
    return Text(*(np.array([number[c] for c in side], np.uint16) for side in (train_text, valid_text)))


def nanogpt(text: Text, seed: int) -> Run:
    """AdamW 1e-3 to 1e-4 by a cosine, 100 steps of warm-up, β2 0.99, decay 0.1, clip 1."""
    config = ThinkerConfig.model_validate({"vocab_size": vocabulary(text)} | SIZES)
    settings = TrainConfig(
        steps=2000, batch_size=12, optimizer="adamw", lr=1e-3, schedule="cosine", warmup=0.05, beta2=0.99
    )
    torch.manual_seed(seed)
    model: Any = gpt2.GPT2(config)
    run = prepared(model, config, settings.changed(seed=seed), text, "float32", compiled=True)
    run.optimizers = [gpt2.optimizer(model)]
    return run


def ours(text: Text, seed: int, steps: int = 1000, compiled: bool = True, **settings: Any) -> Run:
    """QK-norm, zero output projections, Muon, linear to zero; d_ff 352 for SwiGLU's third matrix."""
    architecture = {"vocab_size": vocabulary(text), "d_ff": 352, "use_qk_norm": True}
    architecture |= {name: settings.pop(name) for name in list(settings) if name in ThinkerConfig.model_fields}
    config = ThinkerConfig.model_validate(SIZES | architecture)
    chosen = {"batch_size": 24, "lr": 3e-3, "muon_lr": 1e-2, "beta2": 0.95} | settings
    recipe = TrainConfig.model_validate(chosen | {"steps": steps, "seed": seed})
    return rehearse(config, recipe, text, fast(), compiled)


def vocabulary(text: Text) -> int:
    """Characters that there are."""
    return 1 + int(max(text.train.max(), text.valid.max()))


CONTESTANTS = {
    NANOGPT: nanogpt,
    OURS: lambda text, seed: ours(text, seed, lr=LR_ON_NEW_TEXT),
    OURS_SHORT: lambda text, seed: ours(text, seed, steps=250, batch_size=12, lr=LR_ON_NEW_TEXT),
}


def main() -> None:
    """Run what is missing, then write tables and pictures."""
    parser = argparse.ArgumentParser(description="nanoGPT's run on a processor, its recipe and ours.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--names", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--speeds", action="store_true", help="measure the seconds a step again, in turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = characters()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    for seed in options.seeds:
        for name in options.names:
            if any((one["name"], one["seed"]) == (name, seed) for one in results["runs"]):
                continue
            done = train(CONTESTANTS[name](text, seed), name, LOOKS)
            print(f"{name}, seed {seed}: {done.loss:.4f} after {done.looks[-1].seconds:.0f} s", flush=True)
            results["runs"].append(done.to_json())
            write(results)
    if options.speeds or "seconds_a_step" not in results:
        speeds = seconds_in_turns([make(text, 0) for make in CONTESTANTS.values()], rounds=5, steps=4)
        results["seconds_a_step"] = dict(zip(CONTESTANTS, speeds, strict=True))
        write(results)
    pictures.learning(HERE / "nanogpt_tokens.png", results["runs"], list(CONTESTANTS), "tokens")
    pictures.learning(
        HERE / "nanogpt_seconds.png", results["runs"], list(CONTESTANTS), "seconds", results["seconds_a_step"]
    )
    print(table(results))


def write(results: dict[str, Any]) -> None:
    """After every run, so that nothing is lost."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Markdown: loss with its spread, and the time of a run from the seconds a step measured in turns."""
    lines = [
        "| recipe | seeds | characters | parameters | validation loss, mean ± standard deviation | range | time |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds = results.get("seconds_a_step", {})
    whole = None
    for name in CONTESTANTS:
        runs = [one for one in results["runs"] if one["name"] == name]
        if not runs:
            continue
        ends = [one["looks"][-1] for one in runs]
        losses = np.array([end["loss"] for end in ends])
        # As long as the seconds a step haven't been measured in turns, those of the runs themselves.
        time = ends[0]["step"] * seconds[name] if name in seconds else np.mean([end["seconds"] for end in ends])
        whole = whole or time
        lines.append(
            f"| {name} | {len(runs)} | {ends[0]['tokens']:,} | {runs[0]['parameters']:,} | "
            f"{losses.mean():.3f} ± {losses.std(ddof=1) if len(losses) > 1 else 0:.3f} | "
            f"{losses.min():.3f} to {losses.max():.3f} | {time / whole:.3f} × |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
