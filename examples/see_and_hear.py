"""`make demo-senses`: one model learns to read digits, to hear digits, and to answer about both.

    python examples/see_and_hear.py --out runs/senses

In two runs: pictures and recordings alone first, then also questions about one of each. At the end stand the exact
answers to what it has never seen nor heard, and a picture of some of them. Without the recordings it learns to read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from thinker import commands
from thinker.commands import train
from thinker.data.digits import recordings

SMALL = ["--d-model", "128", "--n-layers", "3", "--d-ff", "256", "--ctx-len", "128"]
# No state is chosen by what is held out: that is the test.
HOW = ["--chat", "--batch-size", "16", "--beta2", "0.95", "--validate-every", "60", "--early-stop", "0"]


def main(out: Path = Path("runs/senses"), reading_steps: int = 350, answering_steps: int = 400) -> int:
    """Train, and say what to try next."""
    try:
        recordings()
    except ValueError as error:
        print(f"No recordings, so it learns to read alone. {error}", file=sys.stderr)
        arguments = [*HOW, *SMALL, "--data", "digits", "--steps", str(reading_steps), "--muon-lr", "0.02"]
        return run([*arguments, "--out", str(out)])
    first = out.with_name(out.name + "-first")
    arguments = [*HOW, *SMALL, "--data", "digits", "fsdd", "--steps", str(reading_steps), "--muon-lr", "0.02"]
    status = run([*arguments, "--out", str(first)])
    if status:
        return status
    arguments = [*HOW, "--init", str(first), "--data", "digits", "fsdd", "digit-sums"]
    arguments += ["--steps", str(answering_steps), "--muon-lr", "0.02"]
    return run([*arguments, "--out", str(out)])


def run(arguments: list[str]) -> int:
    """`thinker train` with these arguments."""
    print("thinker train", " ".join(arguments), file=sys.stderr)
    return train.run(commands.parse(train.Options, "train", arguments))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
