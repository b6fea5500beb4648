"""What a model sees and hears: exact match on held-out pictures, recordings and pairs of both, and what text costs.

    python -m benchmarks.senses                            everything: three seeds, six speakers, ablations, text
    python -m benchmarks.senses --only joint --seeds 0     one part, one seed

Each run trains from nothing in build/senses/, asks everything that is held out, and is recorded in
benchmarks/senses.json; runs that are recorded there are not repeated. SENSES.md is written from it after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import thinker
from thinker import commands, load
from thinker.answers import answers, by_question, conversations_of, share
from thinker.commands import train
from thinker.data.chats import Conversation
from thinker.data.digits import QUESTIONS, SPEAKERS, answer_to
from thinker.data.sources import open_evaluation

HERE = Path(__file__).parent
RECORD, REPORT, RUNS = HERE / "senses.json", HERE / "SENSES.md", Path("build/senses")
PARTS = ("joint", "speakers", "ablations", "text")
ARCHITECTURE = ["--d-model", "128", "--n-layers", "3", "--d-ff", "256", "--ctx-len", "128"]
# What is held out is the test here: no state is chosen by it.
HOW = [
    "--early-stop",
    "0",
    "--beta2",
    "0.95",
    "--weight-decay",
    "0",
    "--chat",
    "--batch-size",
    "16",
    "--precision",
    "bfloat16",
    "--validate-every",
    "100000",
]
TEXT_MODEL = ["--data", "stdlib", *ARCHITECTURE]
SETS = ("digits", "fsdd", "digit-sums")
# Models that never heard a speaker: what the record calls them, whether bands are levelled, fifths of the steps.
UNHEARD = {"": (False, 2), ", bands levelled": (True, 2), ", bands levelled, longer": (True, 3)}

Values = dict[str, Any]


def trained(name: str, arguments: Sequence[str]) -> tuple[Path, float]:
    """The folder of a finished run, and the processor seconds that it took; one that is there is not repeated."""
    folder = RUNS / name
    finished = folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        status = train.run(commands.parse(train.Options, "train", [*arguments, "--out", str(folder)]))
        assert status == 0, (name, status)
        shutil.rmtree(folder / "training")
        finished.write_text(str(time.process_time() - began), encoding="utf-8")
    return folder, float(finished.read_text(encoding="utf-8"))


def asked(folder: Path, sets: Sequence[str]) -> Values:
    """The share of exact replies for each set, and where a set has several kinds of questions, for each of them."""
    llm = load(folder)
    found: Values = {}
    for name in sets:
        given = answers(llm, conversations_of(name))
        found[name] = share(given)
        if name == "digit-sums":
            found["by_question"] = {words: share(some) for words, some in by_question(given).items()}
            found |= alone(llm, conversations_of(name))
    return found


def alone(llm: Any, conversations: Sequence[Conversation]) -> Values:
    """Exact replies to `digit-sums` where the picture, or the recording, is another one than the answer is about.

    What is left is what one modality alone is worth. Beside it the most that knowing one digit allows, and none.
    """
    found: Values = {}
    rows = [one.with_whole_paths for one in conversations]
    for kind, name in (("image", "other_picture"), ("audio", "other_sound")):
        swapped = []
        for number, messages in enumerate(rows):
            other = rows[(number + 3 * 37) % len(rows)]  # of the same question, far away
            given = next(part for part in other[0]["content"] if part["type"] == kind)
            content = [given if part["type"] == kind else part for part in messages[0]["content"]]
            swapped.append(Conversation("", ({**messages[0], "content": content}, messages[1])))
        found[name] = share(answers(llm, swapped))
    guesses = [best_guess(question) for question in QUESTIONS]
    found["best_with_one_alone"] = statistics.mean(one for one, _ in guesses)
    found["best_with_none"] = statistics.mean(none for _, none in guesses)
    return found


def best_guess(question: str) -> tuple[float, float]:
    """The best share of right answers when one of two digits is known, and when none is; as the set draws them."""
    chances = {}
    for shown in range(10):
        for spoken in range(10):
            even = 0.01 if question != "same?" else 0.005 + 0.05 * (shown == spoken)
            chances[shown, spoken] = even, answer_to(question, shown, spoken)

    def best(pairs: Sequence[tuple[float, str]]) -> float:
        return max(sum(p for p, answer in pairs if answer == guess) for guess in {answer for _, answer in pairs})

    known = sum(best([chances[shown, spoken] for spoken in range(10)]) for shown in range(10))
    return known, best(list(chances.values()))


def joint(seed: int, steps: int) -> Values:
    """One model for all three sets."""
    arguments = [*HOW, *ARCHITECTURE, "--muon-lr", "0.02", "--data", *SETS]
    folder, seconds = trained(f"joint-{seed}", [*arguments, "--steps", str(steps), "--seed", str(seed)])
    return asked(folder, SETS) | {"seconds": seconds, "steps": steps}


def speaker(name: str, how: str, steps: int) -> Values:
    """A model that never heard one speaker."""
    level_bands, fifths = UNHEARD[how]
    steps, data = steps * fifths // 5, f"fsdd:{name}"
    RUNS.mkdir(parents=True, exist_ok=True)
    file = RUNS / f"bands-{level_bands}.json"
    file.write_text(json.dumps({"audio": {"level_bands": level_bands}}), encoding="utf-8")
    arguments = [*HOW, *ARCHITECTURE, "--muon-lr", "0.02", "--data", data, "--steps", str(steps)]
    folder, seconds = trained(f"speaker-{name}-{level_bands}-{fifths}", [*arguments, "--senses", str(file)])
    return {"fsdd": asked(folder, [data])[data], "seconds": seconds, "steps": steps}


def ablation(name: str, senses: Values, steps: int, init: Path | None = None) -> Values:
    """Digits alone, with another projector, or another share that is trained."""
    steps //= 7
    RUNS.mkdir(parents=True, exist_ok=True)
    file = RUNS / f"{name}.json"
    file.write_text(json.dumps({"image": {}} | senses), encoding="utf-8")
    begin = ["--init", str(init)] if init is not None else ARCHITECTURE
    arguments = [*HOW, *begin, "--muon-lr", "0.02", "--data", "digits", "--steps", str(steps), "--senses", str(file)]
    folder, seconds = trained(name, arguments)
    return {"digits": asked(folder, ["digits"])["digits"], "seconds": seconds, "steps": steps}


def text_model(steps: int) -> Path:
    """A small model of text alone; made once for all parts that begin with it."""
    arguments = [*TEXT_MODEL, "--steps", str(steps // 3), "--batch-size", "16", "--validate-every", "100000"]
    return trained("text-before", arguments)[0]


def bits_per_byte(folder: Path) -> float:
    """Of the held-out files of the standard library."""
    return load(folder).evaluate(document.read() for document in open_evaluation("stdlib")).bits_per_byte


def text(steps: int) -> Values:
    """A text model that learns to see and hear, with text in half of each batch: what that does to its text."""
    before, steps_after = text_model(steps), steps // 4
    arguments = [*HOW, "--init", str(before), "--data", *SETS[:2], "--text", "stdlib", "--steps", str(steps_after)]
    folder, seconds = trained("text-after", [*arguments, "--lr", "0.001", "--muon-lr", "0.005"])
    was, became = bits_per_byte(before), bits_per_byte(folder)
    return asked(folder, SETS[:2]) | {
        "bits_per_byte_before": was,
        "bits_per_byte_after": became,
        "rise": became / was - 1,
        "seconds": seconds,
        "steps": steps_after,
    }


def plan(parts: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Every run by its name."""
    if "joint" in parts:
        for seed in seeds:
            yield f"joint, seed {seed}", lambda seed=seed: joint(seed, steps)
    if "text" in parts:
        yield "text", lambda: text(steps)
    if "speakers" in parts:
        for name in SPEAKERS:
            for how in UNHEARD:
                yield f"speaker {name} left out{how}", lambda name=name, how=how: speaker(name, how, steps)
    if "ablations" in parts:
        frozen = {"projector": {"frozen": True}}
        for name, senses in (
            ("projector of two layers", {}),
            ("projector linear", {"image": {"projector": {"kind": "linear"}}}),
            ("projector not trained", {"image": frozen}),
        ):
            yield name, lambda name=name, senses=senses: ablation(name.replace(" ", "-"), senses, steps)
        for name, froze in (("Thinker trained", False), ("Thinker frozen", True)):
            yield (
                f"from a text model, {name}",
                lambda name=name, froze=froze: ablation(
                    name.replace(" ", "-"), {"freeze_thinker": froze}, steps, text_model(steps)
                ),
            )


def main() -> None:
    """Do what is not recorded yet, and write both files after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=750, help="of a joint run; others take their share of it")
    options = parser.parse_args()
    record: dict[str, Values] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name, measure in plan(options.only, options.seeds, options.steps):
        if name in record:
            continue
        record[name] = measure() | {"version": thinker.__version__}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(record[name]))
        REPORT.write_text(report(record), encoding="utf-8")
    REPORT.write_text(report(record), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Goal:
    """A line of the first table."""

    what: str
    key: str
    at_least: float


GOALS = (
    Goal("pictures of digits", "digits", 0.97),
    Goal("spoken digits, official test split", "fsdd", 0.95),
    Goal("digit-sums, unseen pictures and recordings", "digit-sums", 0.90),
)


def report(record: dict[str, Values]) -> str:
    """The record as Markdown."""
    lines = [
        "# What a model sees and hears",
        "",
        "Exact match of the generated text on held-out data; `python -m benchmarks.senses` measures it again, "
        f"`senses.json` has every figure. Seconds are one core's ({platform.machine()}), of all of `thinker train`.",
        "",
    ]
    runs = [values for name, values in record.items() if name.startswith("joint")]
    if runs:
        lines += [
            f"## One model for three sets, {len(runs)} seed{'s' if len(runs) > 1 else ''}, {runs[0]['steps']} steps",
            "",
            "| held out | aim | " + " | ".join(name for name in record if name.startswith("joint")) + " |",
            "|---|---|" + "---|" * len(runs),
        ]
        for goal in GOALS:
            cells = " | ".join(f"{run[goal.key]:.1%}" for run in runs)
            lines.append(f"| {goal.what} | {goal.at_least:.0%} | {cells} |")
        for question in QUESTIONS:
            cells = " | ".join(f"{run['by_question'][question]:.1%}" for run in runs)
            lines.append(f"| … {question} | | {cells} |")
        for key, what in (("other_picture", "another picture"), ("other_sound", "another recording")):
            cells = " | ".join(f"{run[key]:.1%}" for run in runs)
            lines.append(f"| digit-sums with {what} put in | | {cells} |")
        one = runs[0]
        lines += [
            "| processor seconds | | " + " | ".join(f"{run['seconds']:.0f}" for run in runs) + " |",
            "",
            f"Whoever knows one of the two digits and guesses best is right in {one['best_with_one_alone']:.1%} of "
            f"digit-sums, whoever knows none in {one['best_with_none']:.1%}. One in ten of the pictures and recordings "
            "put in is of the same digit by chance: that much must remain.",
            "",
        ]
    heard = {name: values for name, values in record.items() if name.startswith("speaker")}
    if heard:
        found = [
            {name: record[key] for name in SPEAKERS if (key := f"speaker {name} left out{how}") in record}
            for how in UNHEARD
        ]
        sides = [side for side in found if side]
        heads = [
            f"{'`level_bands`, ' if level_bands else ''}{next(iter(side.values()))['steps']} steps"
            for side, (level_bands, _) in zip(found, UNHEARD.values(), strict=True)
            if side
        ]
        lines += [
            "## Speakers never heard in training",
            "",
            '`{"audio": {"level_bands": true}}` in a file for `--senses` takes the mean of each mel band off.',
            "",
            f"| left out | {' | '.join(heads)} |",
            "|---" * (1 + len(sides)) + "|",
        ]
        for name in SPEAKERS:
            cells = (f"{side[name]['fsdd']:.1%}" if name in side else "" for side in sides)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        means = (f"{statistics.mean(one['fsdd'] for one in side.values()):.1%}" for side in sides)
        lines += [f"| mean (aim 75 %) | {' | '.join(means)} |", ""]
    if "text" in record:
        values = record["text"]
        lines += [
            "## Adding senses to a text model",
            "",
            f"Bits per byte of held-out text {values['bits_per_byte_before']:.3f} before, "
            f"{values['bits_per_byte_after']:.3f} after ({values['rise']:+.1%}, aim below +5 %); it then reads "
            f"{values['digits']:.1%} of the pictures and hears {values['fsdd']:.1%} of the digits.",
            "",
        ]
    others = [(name, values) for name, values in record.items() if name.startswith(("projector", "from a text"))]
    if others:
        lines += [f"## Ablations, pictures alone, {others[0][1]['steps']} steps", "", "| | exact |", "|---|---|"]
        lines += [f"| {name} | {values['digits']:.1%} |" for name, values in others] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
