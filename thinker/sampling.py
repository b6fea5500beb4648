"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, and seeded draws.

One compiled sampler, `sampling_kernels.py`, serves every decoder; where it can't be compiled, the same in numpy, which
is further down. A draw depends on (seed, request, token index) and the logits alone, so a text does not depend on its
neighbours in a batch. Log-probabilities and beams are not here.
"""

# V vocab_size, n texts drawn for together

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .compiled.library import Kernel

MOST_PENALTY = 1e9  # beyond, scores leave float32

ONE = 1 << 30  # the weight of the likeliest candidate
NEAREST = np.float32(3 << 22)  # added to a small number it leaves no bits after the point
LN2 = tuple(np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))
HALF = (1 << 32) - 1  # a mask, of the lower half of 64 bits

# Columns of the table of settings, one row a slot.
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, TEMPERATURE_LAST = range(6)
# Columns of the table of keys: what one draw's random number depends on.
SEED, REQUEST, INDEX = range(3)

SOURCES = [Path(__file__), Path(__file__).with_name("sampling_kernels.py")]  # the columns above are compiled into them
draw_rows = Kernel("thinker.sampling_kernels", "draw_rows", 9, SOURCES)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises `ValueError` for a value that means nothing.

    Temperature 0 takes the likeliest token (of equals the lowest id). Else the order is Hugging Face's: repetition
    penalty, temperature, top-k, top-p, min-p; with `temperature_last` llama.cpp's, where temperature reshapes only what
    the others leave. 0 for `top_k` and `min_p`, 1 for `top_p` and `repetition_penalty` switch them off. The penalty
    (arXiv 1909.05858) counts the prompt's tokens too unless `penalize_prompt` is false. Like Hugging Face, top-k keeps
    everything that equals its k-th candidate; top-p takes only as many equals as it needs, the lowest ids first.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalize_prompt: bool = True
    temperature_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN fails each of them.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: choose 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: choose 0 (off) or a positive number of candidates")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: choose a number above 0, up to 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: choose a number from 0 (off) to 1")
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            some = f"{1 / MOST_PENALTY:g} to {MOST_PENALTY:g}"
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: choose {some}, 1 is off")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}: choose a number from 0 to 2^64 - 1")


class Draws:
    """What the draws of up to `slots` texts depend on: settings, keys and the tokens each has seen."""

    def __init__(self, slots: int, vocab_size: int) -> None:
        self.settings = np.zeros((slots, 6))
        self.keys = np.zeros((slots, 3), np.uint64)
        self.seen = np.zeros((slots, vocab_size), np.uint8)
        self.scratch = np.zeros((3, vocab_size), np.int32)
        for slot in range(slots):
            self.begin(slot, Sampling())

    def begin(self, slot: int, sampling: Sampling, request: int = 0, prompt: ArrayLike = ()) -> None:
        """Start a text in a slot: its settings, the number that tells it from others of the same seed, its prompt."""
        self.settings[slot] = (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.temperature_last,
        )
        self.keys[slot] = (sampling.seed, request, 0)
        self.seen[slot] = 0
        if sampling.penalize_prompt:
            self.seen[slot, np.asarray(prompt, np.int64)] = 1

    def draw(self, slots: ArrayLike, logits: np.ndarray) -> np.ndarray:
        """The next token of each slot for float32 logits (n, V): int64 (n,). `ValueError` as in `check_drawn`."""
        slots = np.ascontiguousarray(slots, np.int64)
        if slots.size and not 0 <= slots.min() <= slots.max() < len(self.settings):
            raise ValueError(f"slots are {slots.min()} to {slots.max()}: choose among 0 to {len(self.settings) - 1}")
        logits = np.require(logits, np.float32, ["C"])
        if logits.shape != (slots.size, self.seen.shape[1]):
            raise ValueError(f"logits have shape {logits.shape}: expected {(slots.size, self.seen.shape[1])}")
        tokens = np.empty(slots.size, np.int64)
        if not is_compiled():
            for row, slot in enumerate(slots):
                tokens[row] = draw_plainly(logits[row], self.settings[slot], self.keys[slot], self.seen[slot])
            return check_drawn(tokens)
        arrays = (self.settings, self.keys, self.seen, self.scratch, tokens)
        addresses = (array.ctypes.data for array in arrays)
        draw_rows(slots.ctypes.data, slots.size, logits.ctypes.data, logits.shape[1], *addresses)
        return check_drawn(tokens)


@cache
def is_compiled() -> bool:
    """Whether there is a compiled sampler; the first time it may have to be compiled."""
    try:
        draw_rows.prepare()
    except Exception:  # whatever goes wrong in there is Numba's or LLVM's, or that they are missing
        return False
    return True


def check_drawn(tokens: np.ndarray) -> np.ndarray:
    """The tokens of a draw; `ValueError` if a row of logits had no finite number to draw from, or +inf."""
    if tokens.size and tokens.min() < 0:
        raise ValueError(
            "the logits hold no finite number or an infinite one: the model's weights are damaged or its training "
            "diverged"
        )
    return tokens


def draw_plainly(logits: np.ndarray, settings: np.ndarray, key: np.ndarray, seen: np.ndarray) -> int:
    """What `sampling_kernels.draw_one` does, in numpy: the same whole numbers, so the same token, only slower.

    From float32 logits (V,), a row each of the tables of settings and keys, and what was seen (V,); -1 if no logit is
    finite, or one is +inf. Why it is done so is said there.
    """
    seed, request, index = (int(key[column]) for column in (SEED, REQUEST, INDEX))
    key[INDEX] += np.uint64(1)
    penalty = np.float32(settings[PENALTY])
    with np.errstate(all="ignore"):  # what has no probability may overflow
        penalised = np.where(logits < 0, logits * penalty, logits / penalty)
        scores = np.where((seen != 0) & (penalty != 1), penalised, logits)
        scores = np.where(np.isnan(scores), np.float32(-np.inf), scores)
        if not np.isfinite(scores.max()):
            return -1
        token = int(scores.argmax())
        if settings[TEMPERATURE] > 0:
            token = _draw(scores, settings, seed, request, index)
    seen[token] = 1
    return token


def _draw(scores: np.ndarray, settings: np.ndarray, seed: int, request: int, index: int) -> int:
    """One of those that top-k, top-p and min-p leave."""
    temperature = np.float32(max(settings[TEMPERATURE], 1e-30))
    last = settings[TEMPERATURE_LAST] != 0
    weights = _weights(scores, np.float32(1) if last else temperature)
    k = int(settings[TOP_K])
    if 0 < k < scores.size:
        weights[scores < np.partition(scores, -k)[-k]] = 0
    masses = _weights(scores, temperature) if last else weights
    whole = int(weights.sum())
    wanted = min(max(math.ceil(settings[TOP_P] * whole), 1), whole)
    least, first = max(1, math.ceil(settings[MIN_P] * ONE)), scores.size
    while True:
        passed = np.cumsum(np.where(_before(weights, least, first), masses, 0))
        target = _random_bits(seed, request, index) * int(passed[-1]) >> 64
        token = int(np.searchsorted(passed, target, side="right"))
        least, first = int(weights[token]), token
        before = _before(weights, least, first)
        if settings[TOP_P] >= 1 or weights[before].sum() < wanted or (last and masses[before].sum() == 0):
            return token
        index += 1 << 32


def _before(weights: np.ndarray, least: int, first: int) -> np.ndarray:
    """Which candidates are heavier than `least`, or as heavy with an id below `first`."""
    return weights >= np.where(np.arange(weights.size) < first, least, least + 1)


def _weights(scores: np.ndarray, temperature: np.float32) -> np.ndarray:
    """exp((score - largest) / temperature) times 2^30, rounded to whole numbers: int64 (V,)."""
    x = np.maximum((scores - scores.max()) * (np.float32(1 / math.log(2)) / temperature), np.float32(-32))
    n = x + NEAREST
    r = x - (n - NEAREST)
    square = r * r
    power = np.float32(1) + r * LN2[1] + square * (LN2[2] + r * LN2[3])
    power += square * square * (LN2[4] + r * LN2[5] + square * LN2[6])
    scale = ((n.view(np.int32) << 23) + (157 << 23)).view(np.float32)
    return (power * scale + np.float32(0.5)).astype(np.int64)


def _random_bits(seed: int, request: int, index: int) -> int:
    """64 random bits: Philox4x32-10."""
    k0, k1 = seed & HALF, seed >> 32
    c0, c1, c2, c3 = index & HALF, index >> 32 & HALF, request & HALF, request >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & HALF, (a >> 32) ^ c3 ^ k1, a & HALF
        k0, k1 = k0 + 0x9E3779B9 & HALF, k1 + 0xBB67AE85 & HALF
    return c1 << 32 | c0
