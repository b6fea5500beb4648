"""The recorded run: over a million tokens, decoded in different company, chunks and threads, give the same bytes.

    python -m benchmarks.same_bytes [--tokens N]

What is compared is every byte of the logits: of one slot on one thread, prefilled in one go, with those of eight slots
that step together on two threads, and with prefills cut at random places; and the tokens of a text that two threads
write, in float32 with drafts, with those drawn one by one from one thread's logits. The tiny configuration, random
weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from thinker.bench.limits import processor
from thinker.decode.decoder import Weights
from thinker.decode.native import open_native
from thinker.formats import open_model
from thinker.sampling import Draws, Sampling

DTYPES: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
SLOTS = 8
RESULT = Path(__file__).with_name("same_bytes.json")


def comparisons(files: Weights, dtype: Literal["float32", "int8"], seed: int = 0) -> Iterator[tuple[int, int]]:
    """For ever: how many tokens' logits were just compared, and how many of them differed in any byte."""
    config = files.config
    one, two = open_native(files, 1, dtype, 1), open_native(files, SLOTS, dtype, 2)
    rng = np.random.default_rng(seed)
    while True:
        tokens = rng.integers(0, config.vocab_size, config.ctx_len - 1)
        one.truncate(0, 0)
        reference = one.prefill(0, tokens, every=True)
        places = len(tokens) // 8 + np.arange(SLOTS)  # where each slot goes on by itself
        for slot in range(SLOTS):
            two.truncate(slot, 0)
            two.prefill(slot, tokens[: places[slot]])
        while places.max() < len(tokens):
            yield SLOTS, different(two.step(range(SLOTS), tokens[places]), reference[places])
            places += 1
        cut = int(rng.integers(1, len(tokens)))
        two.truncate(0, 0)
        parts = [two.prefill(0, tokens[:cut], every=True), two.prefill(0, tokens[cut:], every=True)]
        yield len(tokens), different(np.concatenate(parts), reference)
        first, written, expected = tokens[:1], Draws(SLOTS, config.vocab_size), Draws(1, config.vocab_size)
        for draws in (written, expected):
            draws.begin(0, Sampling(temperature=0.5, top_p=0.9, seed=cut))
        two.truncate(0, 0)
        one.truncate(0, 0)
        text = two.run([0], first, written, len(tokens))[0]
        logits = one.prefill(0, [*first, *text[:-1]], every=True)
        yield len(text), sum(int(expected.draw([0], row[None])[0] != id) for row, id in zip(logits, text, strict=True))


def different(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many rows differ in any byte."""
    return int((ours.view(np.int32) != theirs.view(np.int32)).any(axis=-1).sum())


def main() -> None:
    """Run it, and write what came out beside this file. Exit status 1 when a byte differed."""
    parser = argparse.ArgumentParser(description="Decode the same tokens in different company: the same bytes?")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="how many to compare, half in each type")
    wanted = parser.parse_args().tokens
    from . import models

    models.build("tiny")
    files = open_model(models.TINY)
    record: dict[str, object] = {"processor": processor(), "date": time.strftime("%Y-%m-%d"), "tokens": {}}
    record |= {"python": platform.python_version(), "numpy": np.__version__, "differing": 0}
    differing = 0
    for dtype in DTYPES:
        compared, said = 0, time.monotonic()
        for tokens, wrong in comparisons(files, dtype):
            compared, differing = compared + tokens, differing + wrong
            if compared * len(DTYPES) >= wanted:
                break
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"{dtype}: {compared:,} tokens, {differing} different", file=sys.stderr, flush=True)
        record["tokens"] |= {dtype: compared}  # type: ignore[operator]
    record["differing"] = differing
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
