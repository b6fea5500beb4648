"""The end of a run on conversations: loss on held-out replies, exact recall of trained ones, examples, what to do next.

Recall says whether the model knows what it was taught, word for word; the held-out loss whether it answers in form.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import track
from rich.text import Text

from ..data.chat_shards import ChatCorpus
from ..evaluate import perplexity
from .replies import exchanges, question, replies, right_reply
from .run import Run
from .senses_summary import summarise_senses
from .summary import draw

RECALLED = 64  # trained questions that are asked
SHOWN = 3


def summarise_chats(run: Run, rows: list[dict[str, Any]], console: Console, wall_seconds: float) -> dict[str, Any]:
    """Show everything and return it as a JSON object. rows: the run's metrics."""
    corpus = run.corpus
    assert isinstance(corpus, ChatCorpus)
    trained, kept = (int((chats.places <= run.config.ctx_len).sum()) for chats in (corpus.train, corpus.valid))
    loss, tokens = reply_loss(run, corpus, console)
    with console.status("asking questions it was trained on"):
        asked = exchanges(corpus.train, run.config.ctx_len, RECALLED)
        answers = replies(run, asked)
        exact = sum(answer == right_reply(run, one) for answer, one in zip(answers, asked, strict=True))
        held_out = exchanges(corpus.valid, run.config.ctx_len, SHOWN)
        unseen = replies(run, held_out)
    bits = loss / math.log(2) * corpus.tokens_per_byte
    picture = draw(run, rows, bits, None)
    console.print(
        f"\nHeld out: {kept:,} conversations that the model has never seen\n"
        f"  loss            [bold]{loss:.3f}[/] nats per token of the assistant's, perplexity {perplexity(loss):.1f}\n"
        f"Trained on: {trained:,} conversations\n"
        f"  exact recall    [bold]{exact} of {len(asked)}[/] ({exact / len(asked):.0%}) first replies, word for word\n"
        f"Trained {run.step:,} steps ({run.batches.epochs(run.step):.2f} epochs) "
        f"in {run.seconds:,.0f} s; {wall_seconds:,.0f} s in all"
    )
    examples = []
    pairs = [*zip(asked[:1], answers[:1], strict=True), *zip(held_out, unseen, strict=True)]
    for number, (exchange, answer) in enumerate(pairs):
        kind = "held out" if number else "trained on"
        examples.append({"kind": kind, "before": question(run, exchange), "reply": answer})
        examples[-1]["right"] = right_reply(run, exchange)
        shown = Text(question(run, exchange) + "\n", style="dim").append(answer + "\n", style="default")
        shown.append(f"(data: {right_reply(run, exchange)})", style="dim")
        console.print(Panel(shown, title=kind, title_align="left", width=100))
    with_senses = {}
    if run.senses is not None and corpus.media is not None:
        with_senses = {"held_out_exact": summarise_senses(run.folder, run.settings.data, corpus, console)}
    folder = escape(shlex.quote(str(run.folder)))
    console.print(
        f"The loss as a picture: {escape(str(picture))}\n\nNext:\n  thinker chat {folder}\n"
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
        "conversations": trained,
        "skipped": {reason: len(places) for reason, places in corpus.tally.places.items()}
        | {"longer than ctx_len": len(corpus.too_long(run.config.ctx_len))},
        "held_out_conversations": kept,
        "held_out_loss": loss,
        "held_out_tokens": tokens,
        "exact_recall": exact / len(asked),
        "recalled": exact,
        "asked": len(asked),
        "parameters": run.config.parameter_count(),
        "examples": examples,
        "decisions": run.decisions.to_json(),
    } | with_senses


@torch.no_grad()
def reply_loss(run: Run, corpus: ChatCorpus, console: Console) -> tuple[float, int]:
    """Mean loss in nats over every token of the assistant's in the held-out conversations, and how many these are."""
    rows = corpus.windows(run.config.ctx_len)
    run.module.eval()
    total, tokens = 0.0, 0
    starts = range(0, len(rows), run.rows_at_once)
    for start in track(starts, "evaluating", console=console, transient=True):
        batch = rows[range(start, min(start + run.rows_at_once, len(rows)))]
        # In the parameters' own precision, even where training computes in a lower one.
        parts = run.module(*(torch.from_numpy(part).to(run.decisions.device) for part in batch))
        total += float(parts.total)
        tokens += int(parts.tokens)
    run.module.train()
    return total / tokens, tokens
