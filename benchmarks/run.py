"""Runs matches and writes what came out: this machine's RESULTS.md, results.json and growth.png, and the table of all.

python -m benchmarks.run [names …] [--rounds N] [--quick] [--list] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from thinker.bench.limits import processor
from thinker.compiled.processor import processors
from thinker.train.decide import versions

from .results import Match, as_json, as_markdown, save, save_overview
from .turns import ROOT, take_turns

MACHINES = ROOT / "benchmarks" / "machines"


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main(
    matches: Sequence[Match], folder: Path | None = None, draw: Callable[[Path], None] = lambda folder: None
) -> None:
    """Run the matches named on the command line, or all. With a folder the results go there, else to stdout."""
    parser = argparse.ArgumentParser(description="Compare Thinker with its peers, in turns.")
    parser.add_argument("names", nargs="*", help="matches; none means all")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--quick", action="store_true", help="one warm-up, two rounds; written to build/benchmarks")
    parser.add_argument("--out", type=Path, help="a folder for the results, in place of the usual one")
    parser.add_argument("--list", action="store_true", help="name all matches and end")
    options = parser.parse_args()
    known = {match.name: match for match in matches}
    if options.list:
        for match in matches:
            print(f"{match.name:16s} {match.title}")
        return
    if unknown := sorted(set(options.names) - known.keys()):
        parser.error(f"no match is called {unknown[0]!r}: choose among {', '.join(known)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least 1 is needed")
    if options.out is not None:
        folder = options.out
    elif options.quick and folder is not None:
        folder = ROOT / "build" / "benchmarks"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    # So that contestants end with this process, however it is ended.
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, lambda number, frame: sys.exit(128 + number))
    chosen = [match for match in matches if not options.names or match.name in options.names]

    from . import models  # not needed to list

    machine = {
        "processor": processor(),
        "cores": processors(),
        "instructions": versions()["capability"],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    built: set[str] = set()
    done = {}
    for number, match in enumerate(chosen, start=1):
        say(f"{number} of {len(chosen)}: {match.title}")
        for model in match.models:
            if model not in built:
                say(f"making the model: {model}")
                models.build(model)
                built.add(model)
        rounds = options.rounds or (2 if options.quick else match.rounds)
        meeting = take_turns(match.contestants, rounds, 1 if options.quick else match.warm_ups, say)
        done[match.name] = as_json(match, meeting, machine)
        if folder is not None:  # after each match: nothing is lost when a later one fails
            save(folder, {match.name: done[match.name]})
            draw(folder)
            if folder.resolve().parent == MACHINES:
                save_overview(MACHINES)
    if folder is None:
        print(as_markdown(done))


if __name__ == "__main__":
    from llvmlite import binding

    from thinker.compiled.processor import TILES

    from . import decode, growth, train_step

    kind = "amx" if TILES else binding.get_host_cpu_name()
    main((*train_step.MATCHES, *decode.MATCHES, *growth.MATCHES), MACHINES / kind, growth.draw)
