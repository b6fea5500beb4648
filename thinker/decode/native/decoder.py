"""`NativeDecoder`: a model's weights and caches in the kernels' layout, and jobs for the threads that run them.

Logits of a row never depend on what else is in its batch, on how a prompt was cut into calls, or on the number of
threads: the same bytes, always. Draws and stop ids are handled in compiled code, so that `run` makes many tokens in one
call. Text is elsewhere, and so is whatever is computed: see `forward.py`.
"""

# T new tokens of one slot, n slots that advance together, V vocab_size, D d_model, L layers, H query heads, K experts

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...sampling import Draws, check_drawn
from ..decoder import Decoder, Weights, check_count, check_draws, check_prompt, check_slots, check_step
from .crew import Crew
from .drafts import Drafts
from .layout import FLOAT16, FLOAT32, QUERIES, ROWS, lay_out, sparse
from .model import BURST, Model
from .packing import Packed


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

    Beside INT8 weights activations are rounded to 16 bits in blocks of 32; keys and values are float16 there, at most
    65504 in size (what is larger becomes that), and else float32: half as much to read, which many streams wait for.
    `threads` None measures which number is fastest. A longer text that is written alone in float32 is drafted in INT8,
    which takes a quarter of the weights' memory more, and half of its keys' and values', unless `drafts` is false.
    Raises `ValueError` for what can't be had.
    """

    def __init__(
        self,
        files: Weights,
        slots: int = 1,
        dtype: Literal["float32", "int8"] = "float32",
        threads: int | None = None,
        drafts: bool = True,
    ) -> None:
        if not 1 <= slots <= ROWS:
            raise ValueError(f"slots is {slots}: choose 1 to {ROWS}")
        if dtype not in ("float32", "int8"):
            raise ValueError(f"dtype is {dtype!r}: native decoding has float32 and int8")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}: choose at least 1, or none to have it measured")
        self.config, self.slots, self.dtype = files.config, slots, dtype
        self._crew = crew = Crew(threads)
        shape, sizes = lay_out(files.config, dtype == "int8", crew.most, FLOAT16 if dtype == "int8" else FLOAT32)
        packed = Packed(files, shape, sizes)
        self.weight_bytes = packed.weights.nbytes + packed.scales.nbytes + packed.floats.nbytes
        # Of float16 the bits, since not every processor computes with it.
        cached, piece = np.int16 if dtype == "int8" else np.float32, int(shape[0]["step_head_cache"])
        caches = sparse(slots * sizes.slot, cached, piece), sparse(slots * sizes.slot, cached, piece)
        self._model = Model(shape, sizes, packed, caches, crew.rows, crew.sync)
        self._lengths = [0] * slots
        if threads is None:
            crew.place(1, 0, 0, 0)
            crew.settle(self._model)
        self._drafts = Drafts(files.config, self._model, slots, crew) if drafts and dtype == "float32" else None

    @property
    def threads(self) -> int:
        """How many make a token; many rows at once are made by all that there are."""
        return self._crew.threads

    @property
    def has_drafts(self) -> bool:
        """Whether a text that is written alone is drafted by now: see `drafts.py`."""
        return self._drafts is not None and self._drafts.ready

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
        if self._drafts is not None:
            self._drafts.truncate(slot, length)

    def prefill(
        self,
        slot: int,
        tokens: ArrayLike | None = None,
        embeddings: np.ndarray | None = None,
        *,
        every: bool = False,
    ) -> np.ndarray:
        """Blocks of up to 64 of T tokens, or of embeddings (T, D): logits (V,), or (T, V) with `every`."""
        held, embedded = self.length(slot), embeddings is not None
        given = check_prompt(self.config, held, tokens, embeddings)
        count = len(given)
        kept = np.empty((count if every else 1, self.config.vocab_size), np.float32)
        for start in range(0, count, ROWS):
            n = min(ROWS, count - start)
            places, rows = np.arange(held + start, held + start + n), given[start : start + n]
            self._crew.place(n, slot, places, 0 if embedded else rows)
            if embedded:
                self._model.x[:n] = rows
            last = start + n == count
            # A job without the last row's logits would save nothing worth a special case.
            first = 0 if every else n - 1
            self._crew.do(self._model, n, together=QUERIES, logits_from=first, embedded=embedded, paced=False)
            if every:
                kept[start : start + n] = self._model.logits[:n, : self.config.vocab_size]
            elif last:
                kept[0] = self._model.logits[n - 1, : self.config.vocab_size]
            self._lengths[slot] += n
        return kept if every else kept[0]

    def step(self, slots: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """One token to each of n slots: (n, V)."""
        chosen, ids = self._check(slots, tokens)
        n = len(chosen)
        self._place(chosen, ids)
        self._crew.do(self._model, n)
        for slot in chosen:
            self._lengths[slot] += 1
        return self._model.logits[:n, : self.config.vocab_size].copy()

    def run(
        self, slots: ArrayLike, tokens: ArrayLike, draws: Draws, count: int = 1, stop: Collection[int] = ()
    ) -> np.ndarray:
        """In few compiled calls, between which Ctrl-C is heard: Python between two tokens would cost a step's 4 %."""
        chosen, last = self._check(slots, tokens, count)
        check_draws(self.config, self.slots, draws)
        n, left, ends = len(chosen), count, np.array(list(stop), np.int64)
        if self._crew.doubts(count):
            before = self.threads
            self._place(chosen[:1], last[:1])
            self._crew.settle(self._model)
            if self._drafts is not None and self.threads != before:
                self._drafts.forget_seconds()
        drafts = self._drafts if n == 1 else None
        drawn = []
        while left:
            new = None
            if drafts is not None:
                new = drafts.write(chosen[0], self._lengths[chosen[0]], last[0], draws, left, ends)
            if new is None:
                self._model.draw_with(draws, ends)
                self._place(chosen, last)
                self._crew.do(self._model, n, draw=1, turns=min(BURST, left))
                new = check_drawn(self._model.drawn[: int(self._model.job["done"]) * n]).reshape(-1, n).copy()
            for slot in chosen:
                self._lengths[slot] += len(new)
            drawn.append(new)
            last = new[-1].tolist()
            left = 0 if np.isin(new[-1], ends).any() else left - len(new)
        return np.concatenate(drawn).T

    def trace(self, tokens: ArrayLike, slot: int = 0) -> NativeTrace:
        """Run T tokens in an empty slot and keep what a person wants to see; the slot is empty again afterwards."""
        if self.length(slot):
            raise ValueError(f"slot {slot} holds {self.length(slot)} tokens: a trace needs an empty one")
        config = self.config
        count = len(check_prompt(config, 0, tokens, None))  # before memory is taken that grows with its square
        K = config.num_experts_per_tok if config.use_moe else 0
        attention = np.zeros((config.n_layers, config.n_heads, count, count), np.float32)
        experts = np.zeros((config.n_layers, count, K), np.int64)
        weights = np.zeros((config.n_layers, count, K), np.float32)
        norms = np.zeros((config.n_layers + 1, count), np.float32)
        seen: dict[str, np.ndarray] = {"attention": attention, "experts": experts, "shares": weights, "norms": norms}
        for name, array in seen.items():
            self._model.job[f"seen_{name}"] = array.ctypes.data
        self._model.job["traced"] = count
        try:
            logits = self.prefill(slot, tokens, every=True)
        finally:
            self._model.job["traced"] = 0
            self._lengths[slot] = 0
        return NativeTrace(logits, attention, experts, weights, norms)

    def _check(self, slots: ArrayLike, tokens: ArrayLike, count: int = 1) -> tuple[list[int], list[int]]:
        """Slots, with one token each and room for `count`; plain Python, quicker than numpy for so few.

        Whatever isn't plainly right goes to the checks that say what is wrong.
        """
        if (
            isinstance(slots, list)
            and isinstance(tokens, list)
            and set(map(type, slots + tokens)) == {int}
            and len(slots) == len(tokens) == len(set(slots))
            and 0 <= min(slots) <= max(slots) < self.slots
            and 0 <= min(tokens) <= max(tokens) < self.config.vocab_size
        ):
            chosen, ids = slots, tokens
        else:
            chosen, ids = (array.tolist() for array in check_step(self.config, self.slots, slots, tokens))
        held = max(self._lengths[slot] for slot in chosen)
        if count < 1 or held + count > self.config.ctx_len:
            check_count(self.config, held, count)
        return chosen, ids

    def _place(self, slots: list[int], tokens: list[int]) -> None:
        """The next token of each slot, into the rows."""
        self._crew.place(len(slots), slots, [self._lengths[slot] for slot in slots], tokens)
