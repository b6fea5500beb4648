"""From prompts to texts over any `Decoder`: slots, draws, stop conditions, and text in whole characters.

`Engine` runs any number of requests through the decoder's slots and yields text as it becomes certain. What a text
says depends on its own request alone: not on its neighbours, nor on how many tokens are computed in one call. Opening a
model and the friendly calls are `llm.py`'s, arithmetic is the decoder's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .decode.decoder import Decoder
from .sampling import Draws, Sampling
from .stop_strings import StopStrings
from .tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]

CONTEXT_FOR_TEXT = 8  # last tokens of the prompt that are decoded first, so that a leading space is not lost
BURST_SECONDS = 0.02  # tokens are computed in calls of about this length: smooth to watch, quick to interrupt
LONGEST_BURST = 64


@dataclass(frozen=True)
class Request:
    """One text to write. The prompt is tokens or embeddings (T, d_model); `echo` is shown before what is generated.

    What embeddings stand for may be said by `stands_for` (T,): token ids, and numbers below -1 for pictures and sounds,
    equal only where the same is at the same place. Then a slot that holds the beginning of it can be reused.
    Requests of equal prompt and sampling write different texts if their `number` differs. Without `eos_ids` only stop
    strings and lengths end a text. Raises `ValueError` for lengths and stop strings that mean nothing.
    """

    tokens: tuple[int, ...] = ()
    embeddings: np.ndarray | None = None
    stands_for: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    echo: str = ""
    number: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: at least 1 is needed")
        if "" in self.stop:
            raise ValueError("a stop string is empty: every text would stop at once")
        if self.embeddings is not None and self.tokens:
            raise ValueError("a prompt is tokens or embeddings, got both")
        if self.stands_for and (self.embeddings is None or len(self.stands_for) != len(self.embeddings)):
            raise ValueError(
                f"stands_for has {len(self.stands_for)} numbers for {self.length} embeddings: give one each"
            )

    @property
    def written(self) -> tuple[int, ...]:
        """The prompt's token ids, as far as they are known, without what stands for pictures and sounds."""
        return tuple(id for id in self.stands_for if id >= 0) if self.stands_for else self.tokens

    @property
    def length(self) -> int:
        """The number of positions that the prompt takes."""
        return len(self.tokens) if self.embeddings is None else len(self.embeddings)

    def room(self, ctx_len: int) -> int:
        """How many tokens may be generated; `ValueError` if the prompt alone leaves no room for one."""
        if self.length == 0:
            raise ValueError("the prompt is empty, and this model has no bos to begin with: give at least one token")
        if self.length >= ctx_len:
            raise ValueError(
                f"the prompt has {self.length} tokens and leaves no room for a new one in ctx_len {ctx_len}: "
                "shorten it, or load the model with a larger ctx_len"
            )
        return min(self.max_new_tokens, ctx_len - self.length)


@dataclass(frozen=True)
class Generation:
    """A finished text. `tokens` are all that were drawn for it, the eos included.

    `finish_reason` is eos, stop (a stop string), or length; with length, `context_full` tells whether it was the
    context that ended. Of the prompt's tokens `reused_tokens` were in memory already. Seconds are those of the
    decoder's calls for this text, not what passes between them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    context_full: bool
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, which comes from the prompt; 0 when there was no second one."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


@dataclass(frozen=True)
class Piece:
    """New text of request number `place` in the list; with the last one comes its `result`."""

    place: int
    text: str
    result: Generation | None = None


class Continuation:
    """A text while it grows token by token: what may be shown of it, and whether it is finished, and why."""

    def __init__(self, request: Request, tokenizer: Tokenizer, limit: int) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos_ids, self._limit = request.eos_ids, limit
        self._stop = StopStrings(request.stop)
        self._characters = tokenizer.stream()
        for id in request.written[-CONTEXT_FOR_TEXT:]:
            self._characters.push(id)

    @property
    def remaining(self) -> int:
        """How many more tokens it may have."""
        return self._limit - len(self.tokens)

    def push(self, id: int) -> str:
        """Add a token: the text that has become certain."""
        assert self.finish_reason is None, "a finished text takes no more tokens"
        self.tokens.append(id)
        if id in self._eos_ids:
            self.finish_reason = "eos"
            return self._end("")
        said = self._stop.push(self._characters.push(id))
        if self._stop.found:
            self.finish_reason = "stop"
        elif not self.remaining:
            self.finish_reason = "length"
            said = self._end(said)
        return said

    def _end(self, said: str) -> str:
        """Everything that was held back, if no stop string is complete with it."""
        said += self._stop.push(self._characters.flush())
        return said if self._stop.found else said + self._stop.flush()


@dataclass
class _Running:
    """A request in a slot."""

    place: int
    request: Request
    continuation: Continuation
    reused: int
    prefill_seconds: float
    decode_seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    def push(self, ids: Sequence[int]) -> Piece:
        """Tokens drawn one after the other; those behind the end are dropped."""
        texts = [self.request.echo] if not self.continuation.tokens else []
        for id in ids:
            texts.append(self.continuation.push(id))
            if self.continuation.finish_reason is not None:
                break
        self.said += texts
        return Piece(self.place, "".join(texts), self._result())

    def _result(self) -> Generation | None:
        reason = self.continuation.finish_reason
        if reason is None:
            return None
        tokens = tuple(self.continuation.tokens)
        return Generation(
            text="".join(self.said),
            tokens=tokens,
            finish_reason=reason,
            context_full=reason == "length" and len(tokens) < self.request.max_new_tokens,
            prompt_tokens=self.request.length,
            reused_tokens=self.reused,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )


class Engine:
    """A decoder with its tokenizer. It knows what each slot holds, so that a conversation can go on from there.

    Threads may share it: they wait for each other's calls of the decoder, and a new run ends another thread's too.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self._draws = Draws(decoder.slots, decoder.config.vocab_size)
        self._held: list[list[int]] = [[] for _ in range(decoder.slots)]
        self._lasting = [False] * decoder.slots  # whether what is held may be gone on from, as conversations are
        self._turn = 0
        self._lock = threading.Lock()  # two calls at once would wait for each other inside of the decoder for ever

    def run(self, requests: Sequence[Request], reuse: bool = False) -> Iterator[Piece]:
        """Write all texts, as many at a time as there are slots; pieces come as they are ready.

        With `reuse` a prompt that begins like the content of a free slot goes on from there; a decoder that promises
        its numbers only within rounding may then write another text. Raises `ValueError` at once for a prompt that
        doesn't fit. A new run takes the slots away from an unfinished one, which raises `ValueError` if continued.
        """
        for request in requests:
            request.room(self.decoder.config.ctx_len)
        with self._lock:
            self._turn += 1
            return self._pieces(requests, reuse, self._turn)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Leave the decoder to somebody else: unfinished texts raise `ValueError`, and what slots held is forgotten."""
        with self._lock:
            self._turn += 1
            self._held = [[] for _ in self._held]
            yield

    def _pieces(self, requests: Sequence[Request], reuse: bool, turn: int) -> Iterator[Piece]:
        waiting = deque(enumerate(requests))
        running: dict[int, _Running] = {}
        burst = 1
        while waiting or running:
            with self._lock:
                self._check_turn(turn)
                if waiting and len(running) < self.decoder.slots:
                    place, request = waiting.popleft()
                    slot, one, id = self._begin(place, request, running, reuse)
                    running[slot] = one
                    drawn = {slot: [id]}
                else:
                    began = time.perf_counter()
                    drawn = self._continue(running, burst)
                    seconds = time.perf_counter() - began
                    for one in running.values():
                        one.decode_seconds += seconds
                    if seconds < BURST_SECONDS / 2:
                        burst = min(2 * burst, LONGEST_BURST)
                    elif seconds > BURST_SECONDS:
                        burst = max(burst // 2, 1)
            for slot, ids in drawn.items():
                piece = running[slot].push(ids)
                if piece.result is not None:
                    del running[slot]
                if piece.text or piece.result is not None:
                    yield piece

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise ValueError("this text was interrupted by a newer one on the same model: finish one stream first")

    def _begin(
        self, place: int, request: Request, running: dict[int, _Running], reuse: bool
    ) -> tuple[int, _Running, int]:
        """Put a request into a free slot: the slot, the request there, and its first token."""
        began = time.perf_counter()
        free = [slot for slot in range(self.decoder.slots) if slot not in running]
        shared = {slot: self._shared(slot, request) if reuse else 0 for slot in free}

        def gain(slot: int) -> int:
            """Tokens that needn't be computed, less those that a conversation loses."""
            return shared[slot] - self._lasting[slot] * (len(self._held[slot]) - shared[slot])

        slot = max(free, key=gain)  # of equals the first, as memory is taken when a slot is first used
        reused = shared[slot]
        self.decoder.truncate(slot, reused)
        del self._held[slot][reused:]  # so that an interrupted prompt isn't taken for the one before
        self._lasting[slot] = reuse
        if request.embeddings is None:
            logits = self.decoder.prefill(slot, request.tokens[reused:])
            self._held[slot] = list(request.tokens)
        else:
            logits = self.decoder.prefill(slot, embeddings=request.embeddings[reused:])
            self._held[slot] = list(request.stands_for) or [-1] * request.length  # like no token
        self._draws.begin(slot, request.sampling, request.number, request.written)
        first = int(self._draws.draw([slot], logits[None])[0])
        continuation = Continuation(request, self.tokenizer, request.room(self.decoder.config.ctx_len))
        return slot, _Running(place, request, continuation, reused, time.perf_counter() - began), first

    def _shared(self, slot: int, request: Request) -> int:
        """How many tokens of a slot a prompt can go on from; its last one is always computed, for its logits."""
        held = self._held[slot]
        if len(held) != self.decoder.length(slot):  # an interrupted call left it in between
            return 0
        wanted = request.stands_for or request.tokens
        most = min(len(held), len(wanted) - 1)
        return next((i for i in range(most) if held[i] != wanted[i]), max(most, 0))

    def _continue(self, running: dict[int, _Running], burst: int) -> dict[int, list[int]]:
        """Up to `burst` tokens for each text, in one call; fewer when one of them ends."""
        slots = sorted(running)
        last = [running[slot].continuation.tokens[-1] for slot in slots]
        count = min(burst, *(one.continuation.remaining for one in running.values()))
        stop = frozenset().union(*(one.request.eos_ids for one in running.values()))
        drawn = dict(zip(slots, self.decoder.run(slots, last, self._draws, count, stop).tolist(), strict=True))
        for slot, id in zip(slots, last, strict=True):
            self._held[slot] += [id, *drawn[slot][:-1]]
        return drawn
