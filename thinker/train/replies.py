"""What a model in training replies to conversations it was, or was not, trained on.

Greedy, from the very tokens of the training data, several at a time. Where it is shown: `report.py`, `chat_summary.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.packing import Chats
from ..decode.torch_decoder import TorchDecoder
from ..generate import Engine, Request
from ..llm import SLOT_BYTES, SLOTS, slot_bytes
from .run import Run


@dataclass(frozen=True)
class Exchange:
    """A conversation up to its first reply, and that reply, as tokens."""

    before: tuple[int, ...]
    reply: tuple[int, ...]  # with the token that ends the turn


def exchanges(chats: Chats, ctx_len: int, count: int) -> list[Exchange]:
    """The first exchanges of up to `count` conversations that fit into the context, evenly spread."""
    fitting = np.flatnonzero(chats.places <= ctx_len)
    chosen = fitting[np.linspace(0, len(fitting) - 1, min(count, len(fitting))).astype(int)]
    found = []
    for i in chosen.tolist():
        ids, said = chats[i]
        start = int(np.argmax(said))
        end = start + int(np.argmin(np.append(said[start:], False)))
        found.append(Exchange(tuple(ids[:start].tolist()), tuple(ids[start:end].tolist())))
    return found


def replies(run: Run, wanted: Sequence[Exchange], longest: int = 64) -> list[str]:
    """The greedy replies, each with room for the right one and a few tokens more, or for `longest` if that is more."""
    run.model.eval()
    slots = max(min(SLOTS, SLOT_BYTES // slot_bytes(run.config), len(wanted)), 1)
    engine = Engine(TorchDecoder(run.model, slots), run.tokenizer)
    requests = [
        Request(
            tokens=exchange.before,
            max_new_tokens=max(longest, len(exchange.reply) + 8),
            eos_ids=frozenset(run.publication.eos_ids),
        )
        for exchange in wanted
    ]
    results = {piece.place: piece.result for piece in engine.run(requests) if piece.result is not None}
    run.model.train()
    return [results[place].text for place in range(len(wanted))]


def right_reply(run: Run, exchange: Exchange) -> str:
    """What the data say."""
    return run.tokenizer.decode(exchange.reply)


def question(run: Run, exchange: Exchange) -> str:
    """What comes before the reply, as text."""
    return run.tokenizer.decode(exchange.before)
