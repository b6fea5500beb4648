"""The end of a run: how well the model does on all held-out text, what it writes, a picture, and what to do next."""

from __future__ import annotations

import lzma
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from ..data.progress import byte_bar
from ..data.shards import Corpus
from ..evaluate import evaluate
from ..plots import loss_curve
from .report import fitting, sample
from .run import Run

CONTINUATIONS = 3
OPENING_CHARACTERS = 80


def summarise(run: Run, rows: list[dict[str, Any]], console: Console, wall_seconds: float) -> dict[str, Any]:
    """Show everything and return it as a JSON object. rows: the run's metrics."""
    assert isinstance(run.corpus, Corpus), "of conversations chat_summary.py gives account"
    documents = [list(document.read()) for document in run.corpus.held_out()]
    with byte_bar("evaluating", run.corpus.valid_bytes) as advance:
        result = evaluate(run.model, run.tokenizer, documents, progress=advance)
    with console.status("asking xz -9"):
        xz = xz_bits_per_byte(run.corpus)
    picture = draw(run, rows, result.bits_per_byte, xz)
    beats = "fewer" if result.bits_per_byte < xz else "more"
    console.print(
        f"\nHeld out: {result.bytes:,} bytes that the model has never seen\n"
        f"  loss            {result.loss:.3f} nats per token, perplexity {result.perplexity:.1f}\n"
        f"  bits per byte   [bold]{result.bits_per_byte:.3f}[/], {beats} than the {xz:.3f} of xz -9\n"
        f"Trained {run.step:,} steps, {run.tokens:,} tokens ({run.batches.epochs(run.step):.2f} epochs) "
        f"in {run.seconds:,.0f} s; {wall_seconds:,.0f} s with preparing and looking"
    )
    continuations = []
    for number, opening in enumerate(openings(run, documents)):
        text = sample(run, opening, seed=number, tokens=96, temperature=0.6)
        continuations.append(text)
        shown = Text(opening, style="dim").append(text.removeprefix(opening), style="default")
        console.print(Panel(shown, title=f"continuation {number + 1}", title_align="left", width=100))
    folder = escape(shlex.quote(str(run.folder)))
    lines = next(iter(openings(run, documents)), "").split("\n")
    first = next((line for line in lines if any(map(str.isalnum, line))), "")[:40]  # no lone bracket or question mark
    console.print(
        f"The loss as a picture: {escape(str(picture))}\n\nNext:\n"
        f"  thinker generate {folder} {escape(shlex.quote(first))} --temperature 0.8\n"
        f"  thinker eval {folder} --data {escape(shlex.join(run.settings.data))}\n"
        f"  thinker train --resume --out {folder} --{'minutes' if run.settings.steps is None else 'steps'} …",
        soft_wrap=True,
    )
    return {
        "steps": run.step,
        "published_step": run.published_step,
        "tokens": run.tokens,
        "epochs": run.batches.epochs(run.step),
        "training_seconds": run.seconds,
        "wall_seconds": wall_seconds,
        "held_out_bytes": result.bytes,
        "held_out_loss": result.loss,
        "held_out_bits_per_byte": result.bits_per_byte,
        "xz_bits_per_byte": xz,
        "parameters": run.config.parameter_count(),
        "continuations": continuations,
        "decisions": run.decisions.to_json(),
    }


def openings(run: Run, documents: list[list[str]]) -> list[str]:
    """Beginnings for the continuations: the one that was asked for, or of held-out documents spread evenly."""
    if run.settings.prompt is not None:
        return [run.settings.prompt] * CONTINUATIONS
    spread = documents[:: max(1, len(documents) // CONTINUATIONS)][:CONTINUATIONS]
    return [fitting(run, beginning("".join(pieces[:1]))) for pieces in spread]


def beginning(text: str) -> str:
    """The first words of a text; it ends before a space, since a token carries the space before its word."""
    cut = text[:OPENING_CHARACTERS]
    return cut if len(text) <= OPENING_CHARACTERS else cut[: max(cut.rfind(" "), 1)].rstrip(" ")


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Bits per byte that `xz -9` needs for the held-out text: a yardstick that has seen no training text."""
    compressor = lzma.LZMACompressor(preset=9)
    size = sum(len(compressor.compress(piece)) for piece in corpus.valid_text()) + len(compressor.flush())
    return 8 * size / corpus.valid_bytes


def draw(run: Run, rows: list[dict[str, Any]], bits_per_byte: float, xz: float | None) -> Path:
    """The loss curve beside the checkpoint."""
    picture = run.folder / "loss.png"
    steps = [row for row in rows if "loss" in row]
    looks = {row["step"]: row["held_out_bits_per_byte"] for row in rows if "held_out_bits_per_byte" in row}
    looks[run.published_step] = bits_per_byte  # of all held-out text, in place of the look at a part of it
    loss_curve(
        picture,
        [row["step"] for row in steps],
        [row["loss"] for row in steps],
        sorted(looks.items()),
        yardstick=xz,
    )
    return picture
