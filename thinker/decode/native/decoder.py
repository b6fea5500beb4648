"""`NativeDecoder`: a model's weights and caches in the kernels' layout, and jobs for the threads that run them.

Logits of a row never depend on what else is in its batch, on how a prompt was cut into calls, or on the number of
threads: the same bytes, always. Draws and stop ids are handled in compiled code, so that `run` makes many tokens in one
call. Text is elsewhere, and so is whatever is computed: see `forward.py`.
"""

# T new tokens of one slot, n slots that advance together, V vocab_size, D d_model, L layers, H query heads, K experts

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product as product_of
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...sampling import Draws, check_drawn
from ..decoder import Decoder, Weights, check_count, check_embeddings, check_room, check_slots, check_tokens
from .kernels import product
from .layout import CHUNK, FLOAT16, JOB, MANY_ROWS, QUERIES, ROWS, aligned, lay_out, sparse
from .pace import Pace, fastest
from .packing import Packed
from .team import Team

BURST = 32  # tokens of one compiled call


@dataclass(frozen=True)
class NativeTrace:
    """What one run of T tokens computed on the way, in float32."""

    logits: np.ndarray  # (T, V)
    attention: np.ndarray  # (L, H, T, T), each row sums to 1
    experts: np.ndarray  # (L, T, K), the chosen experts, best first; K is 0 without experts
    expert_weights: np.ndarray  # (L, T, K), sum to 1
    norms: np.ndarray  # (L + 1, T), length of the stream's vectors after the embedding and after each block


class NativeDecoder(Decoder):
    """A model of any supported architecture in float32 or INT8 with Q8_0's numbers, up to 64 slots, on this processor.

    Beside INT8 weights activations are rounded to 16 bits in blocks of 32; keys and values are float16 there and else
    float32: half as much to read, which many streams wait for.
    `threads` None measures which number is fastest. Raises `ValueError` for what can't be had.
    """

    def __init__(
        self,
        files: Weights,
        slots: int = 1,
        dtype: Literal["float32", "int8"] = "float32",
        threads: int | None = None,
    ) -> None:
        if not 1 <= slots <= ROWS:
            raise ValueError(f"slots is {slots}: choose 1 to {ROWS}")
        if dtype not in ("float32", "int8"):
            raise ValueError(f"dtype is {dtype!r}: native decoding has float32 and int8")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}: choose at least 1, or none to have it measured")
        self.config, self.slots, self.dtype = files.config, slots, dtype
        most = threads or processors()
        shape, sizes = lay_out(files.config, dtype == "int8", most)
        self._packed = packed = Packed(files, shape, sizes)
        self.weight_bytes = packed.weights.nbytes + packed.scales.nbytes + packed.floats.nbytes
        # Of float16 the bits, since not every processor computes with it.
        cached = np.int16 if shape[0]["cached"] == FLOAT16 else np.float32
        piece = int(shape[0]["step_head_cache"])
        self._keys, self._values = (sparse(slots * sizes.slot, cached, piece) for _ in range(2))
        self._work, self._plan = aligned(sizes.work, np.float32), aligned(sizes.plan, np.int64)
        self._rows = np.zeros((3, ROWS), np.int64)
        self._row_slots, self._row_places, self._row_tokens = self._rows
        self._drawn = np.zeros(ROWS * BURST, np.int64)
        self._shape, self._jobs = shape, np.zeros(1, JOB)
        self._job = self._jobs[0]
        self._draws: Draws | None = None
        self._stop = np.zeros(0, np.int64)
        self._lengths = [0] * slots
        self._point()
        self._team = Team(shape, self._jobs, most)
        self._pace: Pace | None = None
        # Few rows are little work between two meetings, so that fewer threads may be faster; many rows never are.
        self._most = most
        self.threads = threads or self._settle(most)
        if threads is None:
            self._pace = Pace()

    def length(self, slot: int) -> int:
        """The number of tokens that the slot holds."""
        if not 0 <= slot < self.slots:
            check_slots(self.slots, [slot])
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from `length` on. What is left keeps its bytes, wherever it is cut."""
        if not 0 <= length <= self.length(slot):
            raise ValueError(f"slot {slot} holds {self.length(slot)} tokens and can't be cut to {length}")
        self._lengths[slot] = length

    def prefill(
        self,
        slot: int,
        tokens: ArrayLike | None = None,
        embeddings: np.ndarray | None = None,
        *,
        every: bool = False,
    ) -> np.ndarray:
        """Blocks of up to 64 of T tokens, or of embeddings (T, D): logits (V,), or (T, V) with `every`."""
        if (tokens is None) == (embeddings is None):
            raise ValueError(
                f"exactly one of tokens and embeddings is needed, got {'none' if tokens is None else 'both'}"
            )
        given = check_tokens(self.config, tokens) if tokens is not None else None
        vectors = check_embeddings(self.config, embeddings) if embeddings is not None else None
        count = len(given) if given is not None else len(vectors)  # type: ignore[arg-type]
        held = self.length(slot)
        check_room(self.config, held, count)
        kept = np.empty((count if every else 1, self.config.vocab_size), np.float32)
        for start in range(0, count, ROWS):
            n = min(ROWS, count - start)
            self._row_slots[:n] = slot
            self._row_places[:n] = np.arange(held + start, held + start + n)
            if given is not None:
                self._row_tokens[:n] = given[start : start + n]
            else:
                assert vectors is not None
                self._x[:n] = vectors[start : start + n]
            last = start + n == count
            # A job without the last row's logits would save nothing worth a special case.
            self._do(n, together=QUERIES, logits_from=0 if every else n - 1, embedded=vectors is not None)
            if every:
                kept[start : start + n] = self._logits[:n, : self.config.vocab_size]
            elif last:
                kept[0] = self._logits[n - 1, : self.config.vocab_size]
            self._lengths[slot] += n
        return kept if every else kept[0]

    def step(self, slots: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """One token to each of n slots: (n, V)."""
        chosen = self._place(slots, tokens)
        n = len(chosen)
        self._do(n)
        for slot in chosen:
            self._lengths[slot] += 1
        return self._logits[:n, : self.config.vocab_size].copy()

    def run(
        self, slots: ArrayLike, tokens: ArrayLike, draws: Draws, count: int = 1, stop: Collection[int] = ()
    ) -> np.ndarray:
        """In few compiled calls, between which Ctrl-C is heard: Python between two tokens would cost a step's 4 %."""
        chosen = self._place(slots, tokens, count)
        n = len(chosen)
        self._bind(draws)
        if list(stop) != self._stop.tolist():
            self._stop = np.array(list(stop), np.int64)
            self._job["stop"], self._job["stops"] = self._stop.ctypes.data, self._stop.size
        drawn, left = [], count
        while left:
            self._do(n, draw=1, turns=min(BURST, left))
            done = int(self._job["done"])
            for slot in chosen:
                self._lengths[slot] += done
            drawn.append(check_drawn(self._drawn[: done * n]).reshape(done, n).copy())
            left = 0 if np.isin(drawn[-1][-1], self._stop).any() else left - done
        return np.concatenate(drawn).T

    def trace(self, tokens: ArrayLike, slot: int = 0) -> NativeTrace:
        """Run T tokens in an empty slot and keep what a person wants to see; the slot is empty again afterwards."""
        if self.length(slot):
            raise ValueError(f"slot {slot} holds {self.length(slot)} tokens: a trace needs an empty one")
        config, count = self.config, len(check_tokens(self.config, tokens))
        K = config.num_experts_per_tok if config.use_moe else 0
        attention = np.zeros((config.n_layers, config.n_heads, count, count), np.float32)
        experts = np.zeros((config.n_layers, count, K), np.int64)
        weights = np.zeros((config.n_layers, count, K), np.float32)
        norms = np.zeros((config.n_layers + 1, count), np.float32)
        seen: dict[str, np.ndarray] = {"attention": attention, "experts": experts, "shares": weights, "norms": norms}
        for name, array in seen.items():
            self._job[f"seen_{name}"] = array.ctypes.data
        self._job["traced"] = count
        try:
            logits = self.prefill(slot, tokens, every=True)
        finally:
            self._job["traced"] = 0
            self._lengths[slot] = 0
        return NativeTrace(logits, attention, experts, weights, norms)

    def _point(self) -> None:
        """Fill in the record's addresses; the shared work space was laid out from 0."""
        s = self._shape[0]
        work = self._work.ctypes.data
        for name in ("x", "q", "y", "hidden", "logits", "own"):
            s[name] = work + 4 * s[name]
        for name, array in (
            ("weights", self._packed.weights),
            ("scales", self._packed.scales),
            ("floats", self._packed.floats),
            ("keys", self._keys),
            ("values", self._values),
            ("plan", self._plan),
            ("slots", self._row_slots),
            ("places", self._row_places),
            ("tokens", self._row_tokens),
        ):
            s[name] = array.ctypes.data
        s["product"] = product.prepare()
        s["step_own"] *= 4  # from here on in bytes, as they are added to addresses
        s["step_plan"] *= 8
        self._job["drawn"] = self._drawn.ctypes.data

        def rows(address: int, width: int) -> np.ndarray:
            start = (address - work) // 4
            return self._work[start : start + ROWS * width].reshape(ROWS, width)

        self._x, self._logits = rows(int(s["x"]), self.config.d_model), rows(int(s["logits"]), int(s["vocab_width"]))

    def _place(self, slots: ArrayLike, tokens: ArrayLike, count: int = 1) -> list[int]:
        """Put one token a slot into the rows, where `count` fit; plain Python, quicker than numpy for so few."""
        chosen: list[int] = np.asarray(slots).tolist() if not isinstance(slots, list) else slots
        ids: list[int] = np.asarray(tokens).tolist() if not isinstance(tokens, list) else tokens
        lengths, room, vocab = self._lengths, self.config.ctx_len, self.config.vocab_size
        if len(chosen) != len(ids):
            raise ValueError(f"{len(chosen)} slots and {len(ids)} tokens: give one token a slot")
        if len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0 or max(chosen) >= self.slots:
            check_slots(self.slots, chosen)
        if min(ids) < 0 or max(ids) >= vocab:
            check_tokens(self.config, ids)
        places = [lengths[slot] for slot in chosen]
        if count < 1 or max(places) + count > room:
            check_count(self.config, max(places), count)
        n = len(chosen)
        self._row_slots[:n], self._row_places[:n], self._row_tokens[:n] = chosen, places, ids
        return chosen

    def _bind(self, draws: Draws) -> None:
        """Tell the kernels of a table of draws."""
        if draws is self._draws:
            return
        if draws.seen.shape[0] < self.slots or draws.seen.shape[1] != self.config.vocab_size:
            raise ValueError(
                f"draws are for {draws.seen.shape[0]} slots and {draws.seen.shape[1]} tokens, the decoder has "
                f"{self.slots} and {self.config.vocab_size}"
            )
        self._draws = draws  # and keep its arrays alive
        for name in ("settings", "keys", "seen"):
            self._job[name] = getattr(draws, name).ctypes.data

    def _do(
        self,
        rows: int,
        *,
        together: int = 1,
        logits_from: int = 0,
        embedded: bool = False,
        draw: int = 0,
        turns: int = 1,
    ) -> None:
        """One job for the team."""
        job = self._job
        job["rows"], job["together"], job["logits_from"], job["embedded"] = rows, together, logits_from, embedded
        job["draw"], job["turns"] = draw, turns
        wanted = self._most if rows >= MANY_ROWS else self.threads
        if self._pace is None or together > 1:
            job["threads"] = wanted
            self._team.do()
            return
        job["threads"] = threads = self._pace.begin(wanted)
        start = time.perf_counter()
        self._team.do()
        self._pace.end(threads, rows, (time.perf_counter() - start) / (int(job["done"]) if draw else 1))

    def _settle(self, most: int) -> int:
        """Measure how many threads, and how many panels abreast, make a token fastest: the number of threads."""

        def one_token(choice: tuple[int, int]) -> None:
            self.threads, self._shape["abreast"] = choice
            self._do(1)

        counts = [count for count in (1, 2, 4, 8) if count < most] + [most]
        self._place([0], [0])
        threads, self._shape["abreast"] = fastest(product_of(counts, (CHUNK, 1)), one_token)
        return threads


def processors() -> int:
    """How many processors this process may use, 16 at most: more only wait for each other at this size of model."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, 16)
