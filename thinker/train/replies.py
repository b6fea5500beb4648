"""What a model in training replies to conversations it was, or was not, trained on.

Greedy, from the very tokens of the training data, several at a time. Where it is shown: `report.py`, `chat_summary.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.packing import Chats
from ..decode.torch_decoder import TorchDecoder
from ..generate import Engine, Request
from ..llm import SLOT_BYTES, SLOTS, slot_bytes
from .run import Run, as_numpy
from .senses import SplicedLoss

MEDIA_SHOWN = {"<|image|>": "picture", "<|audio|>": "sound"}


@dataclass(frozen=True)
class Exchange:
    """A conversation up to its first reply, and that reply, as tokens."""

    before: tuple[int, ...]
    reply: tuple[int, ...]  # with the token that ends the turn
    media: tuple[int, ...] = ()  # which picture or sound stands at each token before


def exchanges(chats: Chats, ctx_len: int, count: int) -> list[Exchange]:
    """The first exchanges of up to `count` conversations that fit into the context, evenly spread."""
    fitting = np.flatnonzero(chats.places <= ctx_len)
    chosen = fitting[np.linspace(0, len(fitting) - 1, min(count, len(fitting))).astype(int)]
    found = []
    for i in chosen.tolist():
        ids, said = chats[i]
        start = int(np.argmax(said))
        end = start + int(np.argmin(np.append(said[start:], False)))
        media = () if chats.media is None else tuple(chats.media_of(i)[:start].tolist())
        found.append(Exchange(tuple(ids[:start].tolist()), tuple(ids[start:end].tolist()), media))
    return found


def replies(run: Run, wanted: Sequence[Exchange], longest: int = 64) -> list[str]:
    """The greedy replies, each with room for the right one and a few tokens more, or for `longest` if that is more."""
    run.module.eval()
    slots = max(min(SLOTS, SLOT_BYTES // slot_bytes(run.config), len(wanted)), 1)
    engine = Engine(TorchDecoder(run.model, slots), run.tokenizer)
    requests = [
        Request(
            **prompt(run, exchange),
            max_new_tokens=max(longest, len(exchange.reply) + 8),
            eos_ids=frozenset(run.publication.eos_ids),
        )
        for exchange in wanted
    ]
    results = {piece.place: piece.result for piece in engine.run(requests) if piece.result is not None}
    run.module.train()
    return [results[place].text for place in range(len(wanted))]


@torch.no_grad()
def prompt(run: Run, exchange: Exchange) -> dict[str, Any]:
    """The prompt of a `Request`: tokens, or with pictures and sounds the embeddings that the senses make of them."""
    if not any(exchange.media) or not isinstance(run.module, SplicedLoss):
        return {"tokens": exchange.before}
    device = run.model.tok_emb.weight.device
    tokens, media = (torch.tensor(row, device=device)[None] for row in (exchange.before, exchange.media))
    return {"embeddings": as_numpy(run.module.embed(tokens, media)[0]).astype(np.float32)}


def right_reply(run: Run, exchange: Exchange) -> str:
    """What the data say."""
    return run.tokenizer.decode(exchange.reply)


def question(run: Run, exchange: Exchange) -> str:
    """What comes before the reply, as text; a picture or a sound is told by its name."""
    media = exchange.media or (0,) * len(exchange.before)
    ids, shown = [], []
    for place, (id, medium) in enumerate(zip(exchange.before, media, strict=True)):
        if not medium:
            ids.append(id)
        elif place and media[place - 1] != medium:
            shown += [run.tokenizer.decode(ids), f"({MEDIA_SHOWN[run.tokenizer.token_bytes(id).decode()]}) "]
            ids = []
    return "".join(shown) + run.tokenizer.decode(ids)
