"""`make demo-senses`: one model learns to read digits, to hear digits, and to answer about both.

    python examples/see_and_hear.py --out runs/senses

At the end stand the exact answers to what it has never seen nor heard, and a picture of some of them. Without the
recordings it learns to read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from thinker import commands
from thinker.commands import train
from thinker.data.digits import recordings

SMALL = ["--d-model", "128", "--n-layers", "3", "--d-ff", "256", "--ctx-len", "128"]
HOW = ["--chat", "--batch-size", "16", "--muon-lr", "0.02", "--beta2", "0.95", "--weight-decay", "0"]
# No state is chosen by what is held out: that is the test.
HOW += ["--early-stop", "0"]


def main(out: Path = Path("runs/senses"), steps: int = 750) -> int:
    """Train, and say what to try next."""
    data = ["digits", "fsdd", "digit-sums"]
    try:
        recordings()
    except ValueError as error:
        print(f"No recordings, so it learns to read alone. {error}", file=sys.stderr)
        data, steps = ["digits"], steps // 2
    arguments = [*HOW, *SMALL, "--data", *data, "--steps", str(steps), "--out", str(out)]
    print("thinker train", " ".join(arguments), file=sys.stderr)
    return train.run(commands.parse(train.Options, "train", arguments))


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
