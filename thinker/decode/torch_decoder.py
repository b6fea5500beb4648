"""Decoding with the readable model itself, on whatever device it stands.

The reference that native decoding is compared with, the road to accelerators, and what training uses for its samples.
Rows of one batch agree with the row alone within rounding, not bit for bit: a matrix product of another height adds in
another order. Draws, stop conditions and text are elsewhere.
"""

# B slots in one forward, T new tokens, D d_model, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..cache import KVCache
from ..model import ThinkerLM
from .decoder import Decoder, check_prompt, check_room, check_slots, check_step
from .fixed_step import FixedStep


class TorchDecoder(Decoder):
    """A `ThinkerLM` with `slots` sequences in its memory. A model in training is switched to eval for each call.

    `fixed`: tokens go to all slots at fixed addresses, which an accelerator replays as a graph; None means there only.
    """

    def __init__(self, model: ThinkerLM, slots: int = 1, fixed: bool | None = None) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}: at least 1 is needed")
        self.model, self.config, self.slots = model, model.config, slots
        self.dtype = str(model.head.weight.dtype).removeprefix("torch.")
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.cache = self._empty(rows=1)
        self.fixed = model.head.weight.device.type == "cuda" if fixed is None else fixed
        self._step: FixedStep | None = None

    def length(self, slot: int) -> int:
        """The number of tokens that the slot holds."""
        (slot,) = check_slots(self.slots, [slot])
        return self.cache.lengths[slot] if slot < len(self.cache.lengths) else 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from `length` on."""
        if not 0 <= length <= self.length(slot):
            raise ValueError(f"slot {slot} holds {self.length(slot)} tokens and can't be cut to {length}")
        if length < self.length(slot):
            self.cache.truncate(slot, length)

    def prefill(
        self,
        slot: int,
        tokens: ArrayLike | None = None,
        embeddings: np.ndarray | None = None,
        *,
        every: bool = False,
    ) -> np.ndarray:
        """One forward over all T tokens or embeddings (T, D): logits (V,), or (T, V) with `every`."""
        given = torch.tensor(check_prompt(self.config, self.length(slot), tokens, embeddings))[None]
        weight = self.model.tok_emb.weight
        ids, vectors = (given.to(weight.device), None) if embeddings is None else (None, given.to(weight))
        logits = self._forward(slot, slot + 1, ids, vectors, every)  # (1, T or 1, V)
        return logits[0] if every else logits[0, 0]

    def step(self, slots: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """One token to each of n slots: (n, V). Slots that stand side by side share a forward."""
        chosen, ids = check_step(self.config, self.slots, slots, tokens)
        for slot in chosen.tolist():
            check_room(self.config, self.length(slot), 1)
        if self.fixed:
            return self._fixed(chosen, ids)
        logits = np.empty((len(ids), self.config.vocab_size), np.float32)
        for places in _neighbours(chosen):
            first, last = int(chosen[places[0]]), int(chosen[places[-1]])
            column = torch.from_numpy(ids[places])[:, None].to(self.model.tok_emb.weight.device)  # (B, 1)
            logits[places] = self._forward(first, last + 1, column, None, every=False)[:, 0]
        return logits

    @torch.no_grad()  # and not inference mode, whose tensors a graph may not write to
    def _fixed(self, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """`step` by `FixedStep`, which is made anew when the memory was."""
        self._reserve(int(slots.max()) + 1)
        with speaking(self.model):
            if self._step is None or self._step.memory is not self.cache:
                self._step = FixedStep(self.model, self.cache)
            logits = self._step(slots, ids, self.cache.lengths)
        for slot in slots.tolist():
            self.cache.lengths[slot] += 1
        return logits.float().cpu().numpy()

    @torch.no_grad()
    def _forward(
        self, start: int, end: int, tokens: Tensor | None, embeddings: Tensor | None, every: bool
    ) -> np.ndarray:
        """Run slots start to end - 1 and let them grow: (B, T, V) with `every`, else (B, 1, V), float32."""
        self._reserve(end)
        rows = self.cache.rows(start, end)
        with speaking(self.model):
            hidden = self.model.features(tokens, embeddings=embeddings, kv_cache=rows)
            assert isinstance(hidden, Tensor)
            logits = self.model.head(hidden if every else hidden[:, -1:])
        self.cache.lengths[start:end] = rows.lengths
        return logits.float().cpu().numpy()

    def _empty(self, rows: int) -> KVCache:
        weight = self.model.head.weight
        with torch.inference_mode(False):  # later calls may stand outside of what the first one stands in
            return KVCache.empty(self.config, rows, device=weight.device, dtype=weight.dtype)

    def _reserve(self, rows: int) -> None:
        """Make room for the first `rows` slots: memory is taken when a slot is first used, a long context is dear."""
        held = len(self.cache.lengths)
        if rows <= held:
            return
        grown = self._empty(rows)
        longest = max(self.cache.lengths)  # behind it nothing has been written, and zeros that are copied take memory
        for new, old in ((grown.keys, self.cache.keys), (grown.values, self.cache.values)):
            new[:, :held, :, :longest] = old[:, :, :, :longest]
        grown.lengths[:held] = self.cache.lengths
        self.cache = grown


@contextmanager
def speaking(model: ThinkerLM) -> Iterator[None]:
    """A model in training without its dropout inside the block."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _neighbours(slots: np.ndarray) -> Iterator[np.ndarray]:
    """Places in `slots` whose slots follow one another: of slots [5, 0, 4] first [1], then [2, 0]."""
    order = np.argsort(slots)
    breaks = np.flatnonzero(np.diff(slots[order]) > 1) + 1
    yield from np.split(order, breaks)
