"""The end of a run with pictures and sounds: exact answers to what is held out, and a picture of some of them.

The model is opened as anybody would open it, from its folder. What else a run on conversations ends with is in
`chat_summary.py`.
"""

# T positions of a prompt, N of one medium, L layers, H heads

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ..answers import Answer, answers, by_question, share
from ..data.chat_shards import ChatCorpus
from ..data.chats import Conversation, Skipped, open_chats
from ..llm import LLM, load
from ..messages import media_parts
from ..modality.media import medium_of
from ..modality.settings import FeatureConfig
from ..plots import Example, Shown, answered
from ..trace import trace

ASKED = 360  # of each set at most, evenly spread
SHOWN = 8
ANSWER_TOKENS = 32


def summarise_senses(folder: Path, data: Sequence[str], corpus: ChatCorpus, console: Console) -> dict[str, Any]:
    """Ask what is held out of each set, show the shares and return them as a JSON object; draw `answers.png`."""
    llm = load(folder, backend="torch")
    places = frozenset(corpus.held_out(llm.config.ctx_len))
    report: dict[str, Any] = {}
    examples: list[Answer] = []
    console.print("\nHeld-out pictures and sounds, exact answers:")
    for name in data:
        try:
            given = asked(llm, name, places, console)
        except ValueError as error:  # a file that is gone since: the run is done all the same
            console.print(f"  {escape(name)}: not asked: {escape(str(error))}", highlight=False)
            continue
        if not given:
            continue
        report[name] = {"asked": len(given), "exact": share(given)}
        console.print(f"  {escape(name):14} [bold]{share(given):6.1%}[/] of {len(given)}", highlight=False)
        kinds = by_question(given)
        for some in kinds.values() if len(kinds) <= 4 else [given]:
            examples += some[len(some) // 2 :][:2]
    if examples:
        picture = folder / "answers.png"
        answered(picture, [example_of(llm, one) for one in spread(examples, SHOWN)])
        console.print(f"Examples with what it attended to: {picture}", highlight=False)
    return report


def asked(llm: LLM, name: str, places: Container[str], console: Console) -> list[Answer]:
    """Answers to what stands in these places of a set. Raises `ValueError` for a file that can't be read any more."""
    conversations = spread(with_media(name, places), ASKED)
    given: list[Answer] = []
    starts = range(0, len(conversations), 32)
    quiet = not console.is_interactive  # where a bar would leave an empty line
    for start in track(starts, f"asking {escape(name)}", console=console, transient=True, disable=quiet):
        given += answers(llm, conversations[start : start + 32], ANSWER_TOKENS)
    return given


def with_media(name: str, places: Container[str]) -> list[Conversation]:
    """The conversations of a set in these places that show or play something and end with the assistant's turn.

    The places are the corpus's: alone a set may be split elsewhere than beside others, and holds what was left out.
    """
    found = [item[1] for item in open_chats([name]).sides() if not isinstance(item, Skipped)]
    return [one for one in found if one.where in places and one.media and one.messages[-1]["role"] == "assistant"]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of them, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[place] for place in places.tolist()]


def example_of(llm: LLM, answer: Answer) -> Example:
    """An answer with what its tokens were drawn from: attention, mean over them, layers and heads."""
    embeddings, stands_for = llm.reader.prompt(answer.asked)
    table = llm.model.tok_emb.weight
    # Bytes that are no text were said as one token each, and are three or more when they are read again.
    said = table[llm.tokenizer.encode(answer.said)[: llm.config.ctx_len - len(embeddings)]]
    traced = trace(llm.model, embeddings=torch.cat([torch.from_numpy(embeddings).to(table), said])[None])
    T = len(embeddings)
    seen = torch.stack([layer[0, :, T - 1 :, :T].mean(dim=(0, 1)) for layer in traced.attention]).mean(dim=0)  # (T,)
    places = np.flatnonzero(np.array(stands_for) < 0)
    parts = [part for message in answer.asked for part in media_parts(message["content"])]
    shown, start = [], 0
    config = llm.reader.senses.config
    for part in parts:
        prepared = medium_of(part).prepared(config)
        count = len(llm.reader.senses.of(part["type"]).encode([prepared]))
        weights = seen[torch.from_numpy(places[start : start + count])].cpu().numpy()
        start += count
        if prepared.ndim == 3:  # a square of patches
            weights = weights.reshape(2 * [round(count**0.5)])
            prepared = prepared.squeeze(-1) if prepared.shape[-1] == 1 else prepared
        features = isinstance(config.of(part["type"]), FeatureConfig)
        shown.append(Shown(part["type"], None if features else prepared, weights))
    return Example(shown, answer.words, answer.right, answer.said)
