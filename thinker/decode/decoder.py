"""What generation needs of a model, whoever computes it: slots that hold sequences, prefill, and steps.

A slot is one sequence with its key/value cache; slots fill and empty independently, and several advance in one step.
This room checks what a caller hands in and composes steps with draws; the arithmetic lives in `torch_decoder.py` and
`native/`, the draws in `sampling.py`, text and stop strings in `generate.py`.
"""

# V vocab_size, D d_model, T new tokens of one slot, n slots that advance together

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..config import ThinkerConfig
from ..sampling import Draws


class Weights(Protocol):
    """What a decoder takes of a model's files (`formats.ModelFiles` has it): the architecture and Thinker's tensors."""

    @property
    def config(self) -> ThinkerConfig:
        """The architecture of the tensors."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Float arrays by Thinker's names; what is in Q8_0 already comes with `.quants` and `.scales` instead."""


class Decoder(ABC):
    """A model with `slots` sequences in its memory, each of at most `config.ctx_len` tokens. For one thread only."""

    config: ThinkerConfig
    slots: int
    dtype: str  # the type of the weights: float32, int8, bfloat16 …
    weight_bytes: int  # the memory that they take

    @abstractmethod
    def length(self, slot: int) -> int:
        """The number of tokens that the slot holds."""

    @abstractmethod
    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from `length` on, to reuse a shared prefix; 0 empties the slot."""

    @abstractmethod
    def prefill(
        self,
        slot: int,
        tokens: ArrayLike | None = None,
        embeddings: np.ndarray | None = None,
        *,
        every: bool = False,
    ) -> np.ndarray:
        """Append T token ids or embeddings (T, D) to a slot: float32 logits (V,) after the last, (T, V) with `every`.

        Raises `ValueError` for ids outside the vocabulary, an empty or wrongly shaped input, and beyond `ctx_len`.
        """

    @abstractmethod
    def step(self, slots: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """Append one token to each of n different slots: float32 logits (n, V). The caller may keep the array.

        Raises `ValueError` as `prefill` does; then no slot has changed.
        """

    def run(
        self, slots: ArrayLike, tokens: ArrayLike, draws: Draws, count: int = 1, stop: Collection[int] = ()
    ) -> np.ndarray:
        """Append a token to each of n different slots, draw the next one of each, append those, and so on.

        Returns the ids drawn, int64 (n, k): k is `count`, or less where a slot drew a stop id, with which all end. The
        last ones are drawn but not yet appended. Raises `ValueError` as `step` does, and beyond `ctx_len`.
        """
        chosen = check_slots(self.slots, slots)
        check_count(self.config, max(self.length(int(slot)) for slot in chosen), count)
        check_draws(self.config, self.slots, draws)
        drawn: list[np.ndarray] = []
        while len(drawn) < count and not (drawn and any(id in stop for id in drawn[-1].tolist())):
            tokens = draws.draw(chosen, self.step(chosen, tokens))
            drawn.append(tokens)
        return np.stack(drawn, axis=1)


def check_count(config: ThinkerConfig, held: int, count: int) -> None:
    """Raise `ValueError` unless `count` tokens, at least one, fit on top of `held` ones."""
    if count < 1:
        raise ValueError(f"count is {count}: draw at least 1 token")
    check_room(config, held, count)


def check_room(config: ThinkerConfig, held: int, new: int) -> None:
    """Raise `ValueError` if `new` tokens on top of `held` ones exceed the context."""
    if held + new > config.ctx_len:
        raise ValueError(
            f"{held} + {new} tokens exceed ctx_len {config.ctx_len}: shorten the prompt, ask for fewer new tokens, "
            "or load the model with a larger ctx_len"
        )


def check_draws(config: ThinkerConfig, slots: int, draws: Draws) -> None:
    """Raise `ValueError` for draws of fewer slots or another vocabulary."""
    if draws.seen.shape[0] < slots or draws.seen.shape[1] != config.vocab_size:
        raise ValueError(
            f"draws are for {draws.seen.shape[0]} slots and {draws.seen.shape[1]} tokens, the decoder has {slots} and "
            f"{config.vocab_size}: make them of its size"
        )


def check_prompt(
    config: ThinkerConfig, held: int, tokens: ArrayLike | None, embeddings: np.ndarray | None
) -> np.ndarray:
    """Ids as int64 (T,), or embeddings as float32 (T, D); `ValueError` unless one of both is given, right, and fits."""
    if tokens is not None and embeddings is None:
        given = check_tokens(config, tokens)
    elif embeddings is not None and tokens is None:
        given = check_embeddings(config, embeddings)
    else:
        raise ValueError(f"exactly one of tokens and embeddings is needed, got {'none' if tokens is None else 'both'}")
    check_room(config, held, len(given))
    return given


def check_step(
    config: ThinkerConfig, slots: int, chosen: ArrayLike, tokens: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and ids as int64 (n,) each; `ValueError` if one of them is wrong, or there isn't one token a slot."""
    array, ids = check_slots(slots, chosen), check_tokens(config, tokens)
    if len(array) != len(ids):
        raise ValueError(f"{len(array)} slots and {len(ids)} tokens: give one token a slot")
    return array, ids


def check_slots(slots: int, chosen: ArrayLike) -> np.ndarray:
    """Slot numbers as int64 (n,); `ValueError` if one repeats or is none of the `slots` there are."""
    array = np.asarray(chosen)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"slots have shape {array.shape}: give a sequence of at least one slot number")
    if array.dtype.kind not in "iu":
        raise ValueError(f"slots are {array.dtype}: give whole numbers")
    if array.min() < 0 or array.max() >= slots:
        raise ValueError(
            f"slot {int(array.max() if array.max() >= slots else array.min())} is not one of 0 to {slots - 1}"
        )
    if len(set(array.tolist())) < array.size:
        raise ValueError(f"slots {array.tolist()} repeat one: a slot takes one token a step")
    return array.astype(np.int64)


def check_tokens(config: ThinkerConfig, tokens: ArrayLike) -> np.ndarray:
    """Token ids as int64 (T,); `ValueError` if there is none or one lies outside the vocabulary."""
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"tokens have shape {array.shape}: give a flat sequence of at least one id")
    if array.dtype.kind not in "iu":
        raise ValueError(f"tokens are {array.dtype}: give integer ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size} (ids 0 to "
            f"{config.vocab_size - 1}): is this the model's own tokenizer?"
        )
    return array.astype(np.int64)


def check_embeddings(config: ThinkerConfig, embeddings: np.ndarray) -> np.ndarray:
    """Embeddings as contiguous float32 (T, D); `ValueError` if there is none, or one of another width or not finite."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        array = np.ascontiguousarray(embeddings, np.float32)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != config.d_model:
        raise ValueError(f"embeddings have shape {array.shape}: expected (T, {config.d_model}) with T at least 1")
    finite = np.isfinite(array).all(1)
    if not finite.all():
        raise ValueError(f"embedding {int(finite.argmin())} holds NaN or an infinite number: mend what it was made of")
    return array
