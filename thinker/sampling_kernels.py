"""The compiled half of `sampling.py`: logits to one token, in plain loops over whole numbers.

Weights of candidates are whole numbers (probability relative to the largest, times 2^30): their sums are exact in any
order. Nothing is sorted: bisection finds the border of top-k, and top-p needs none. What is less likely than the
likeliest candidate by a factor of 2^31 is never drawn. What the settings mean is said in `sampling.py`.
"""

# V vocab_size, n texts drawn for together

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .compiled.memory import doubles, floats, integers, marks, unsigned, words
from .sampling import (
    INDEX,
    LN2,
    MIN_P,
    NEAREST,
    ONE,
    PENALTY,
    REQUEST,
    SEED,
    TEMPERATURE,
    TEMPERATURE_LAST,
    TOP_K,
    TOP_P,
)

LOWEST = -(1 << 31)  # the rank of what can't be drawn
INFINITE = 0x7F800000  # the rank of +inf, beside which nothing has a probability
BLOCK = 64  # candidates looked through at once
LOOKS = 4  # before a bisection leaves behind what its border can't be among


def draw_rows(slots, n, logits, V, settings, keys, seen, scratch, tokens):  # type: ignore[no-untyped-def]
    """Draw for each of n rows; -1 marks a row with none finite, or with +inf. All but n and V are addresses."""
    order, weights, scores = words(scratch, 0, V), words(scratch, V, V), floats(scratch, 2 * V, V)
    for row in range(n):
        slot = integers(slots, row, 1)[0]
        integers(tokens, row, 1)[0] = draw_one(
            floats(logits, row * V, V),
            doubles(settings, slot * 6, 6),
            unsigned(keys, slot * 3, 3),
            marks(seen, slot * V, V),
            order,
            weights,
            scores,
        )
    return 0


@njit(error_model="numpy")
def draw_one(logits, settings, key, seen, order, weights, scores):  # type: ignore[no-untyped-def]
    """Draw one token from logits (V,), mark it as seen, and move the key to the next index.

    The last three are work space (V,): int32, int32, float32.
    """
    largest = rank(logits, np.float32(settings[PENALTY]), seen, scores, order)
    token = -1
    if LOWEST < largest < INFINITE:
        if settings[TEMPERATURE] == 0:
            token = first_equal(order, largest)
        else:
            token = draw(scores, order, weights, largest, settings, key)
    if token >= 0:
        seen[token] = 1
    key[INDEX] += np.uint64(1)
    return token


@njit(error_model="numpy")
def rank(logits, penalty, seen, scores, order):  # type: ignore[no-untyped-def]
    """Penalised scores, and whole numbers in the same order, so that comparing needs no care; the largest of these.

    -inf and NaN get the lowest number there is: they are never drawn.
    """
    zero, one = np.float32(0), np.float32(1)
    for i in range(logits.shape[0]):
        scores[i] = logits[i] + zero  # -0 becomes 0, its equal
    if penalty != one:
        for i in range(logits.shape[0]):
            if seen[i]:
                scores[i] = scores[i] * penalty if scores[i] < zero else scores[i] / penalty
    largest = np.int32(LOWEST)
    for i in range(logits.shape[0]):
        ordered = flip(np.float32(scores[i]).view(np.int32))
        order[i] = ordered if scores[i] > np.float32(-np.inf) else np.int32(LOWEST)
        largest = max(largest, order[i])
    return largest


@njit(error_model="numpy")
def flip(bits):  # type: ignore[no-untyped-def]
    """A float's bits as a whole number in the floats' order, and back: bits of negative floats fall as these grow."""
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@njit(error_model="numpy")
def first_equal(order, value):  # type: ignore[no-untyped-def]
    """The lowest id of those that have the value, -1 if none has."""
    start = 0
    while start + BLOCK < order.shape[0]:
        found = False
        for i in range(start, start + BLOCK):
            found |= order[i] == value
        if found:
            break
        start += BLOCK
    for i in range(start, order.shape[0]):
        if order[i] == value:
            return i
    return -1


@njit(error_model="numpy")
def draw(scores, order, weights, largest, settings, key):  # type: ignore[no-untyped-def]
    """One of those that top-k, top-p and min-p leave.

    The border of top-p is never looked for: a candidate that it leaves out is drawn again, among those before it, and
    the one that stands has the chances it had among those that top-p leaves (rejection sampling).
    """
    top = np.int32(flip(largest)).view(np.float32)
    last = settings[TEMPERATURE_LAST] != 0
    temperature = np.float32(max(settings[TEMPERATURE], 1e-30))
    among = np.int32(LOWEST)
    if 0 < settings[TOP_K] < scores.shape[0]:
        among = np.int32(kth_largest(order, largest, np.int64(settings[TOP_K]), weights))
    weigh(scores, top, np.float32(1) if last else temperature, weights)
    if among != LOWEST:
        for i in range(scores.shape[0]):
            weights[i] = weights[i] if order[i] >= among else np.int32(0)
    nucleus = settings[TOP_P] < 1
    wanted = share_of(settings[TOP_P], mass_from(weights, weights, 1)) if nucleus else np.int64(0)
    masses = weights
    if last:
        masses = order
        weigh(scores, top, temperature, masses)
    least, first = max(np.int64(1), np.int64(math.ceil(settings[MIN_P] * ONE))), np.int64(scores.shape[0])
    index = key[INDEX]
    while True:
        token = pick(masses, weights, least, first, random_bits(key[SEED], key[REQUEST], index))
        least, first = np.int64(weights[token]), np.int64(token)
        if not nucleus or mass_before(weights, weights, least, first)[1] < wanted:
            return token
        # Scores as good as equal may be far apart at a last temperature near 0.
        if last and mass_before(masses, weights, least, first)[1] == 0:
            return token
        index += np.uint64(1 << 32)  # a text has fewer tokens


@njit(error_model="numpy")
def weigh(scores, top, temperature, weights):  # type: ignore[no-untyped-def]
    """exp((score - top) / temperature) times 2^30, rounded to whole numbers."""
    # 2^x = 2^n 2^r with |r| <= 1/2, 2^r by its Taylor series: plain arithmetic that compiles to vectors, its parts side
    # by side, as a processor sees only some sixty steps ahead.
    factor = np.float32(1 / math.log(2)) / temperature
    for i in range(scores.shape[0]):
        x = (scores[i] - top) * factor
        x = x if x > np.float32(-32) else np.float32(-32)  # NaN and -inf too; 2^-32 2^30 rounds to 0
        n = np.float32(x + NEAREST)  # its lowest bits are those of the whole number
        r = x - np.float32(n - NEAREST)
        square = r * r
        power = np.float32(1) + r * LN2[1] + square * (LN2[2] + r * LN2[3])
        power += square * square * (LN2[4] + r * LN2[5] + square * LN2[6])
        scale = np.int32((n.view(np.int32) << 23) + (157 << 23)).view(np.float32)  # 2^(n + 30) by its bits
        weights[i] = np.int32(power * scale + np.float32(0.5))


@njit(error_model="numpy")
def kth_largest(order, largest, k, space):  # type: ignore[no-untyped-def]
    """A number that exactly k candidates reach, or the k-th largest itself if others equal it; by bisection."""
    low, high = np.int64(LOWEST), np.int64(largest) + 1  # at least k reach `low`, fewer reach `high`
    left, beyond, fewer, looks = order, np.int64(0), np.int64(0), 0
    while high - low > 1:
        middle = np.int32((low + high) >> 1)
        count = np.int32(0)
        for i in range(left.shape[0]):
            count += np.int32(left[i] >= middle)
        if beyond + count < k:
            high, fewer = np.int64(middle), beyond + count
        else:
            low = np.int64(middle)
            if beyond + count == k:
                break
        looks += 1
        if looks % LOOKS == 0:
            left, beyond = space[: keep_between(left, low, high, space)], fewer
    return low


@njit(error_model="numpy")
def keep_between(numbers, low, high, space):  # type: ignore[no-untyped-def]
    """Put those that are at least `low` and less than `high` into `space`, which may be where they are: how many."""
    count, first, width = np.int64(0), np.uint32(low), np.uint32(high - low)
    for i in range(numbers.shape[0]):
        space[count] = numbers[i]  # unless it stays, the next is written over it
        count += np.uint32(np.uint32(numbers[i]) - first) < width  # both comparisons in one, as below `low` it wraps
    return count


@njit(error_model="numpy")
def share_of(share, mass):  # type: ignore[no-untyped-def]
    """What candidates must weigh together to reach a share of the mass, at least 1."""
    return min(max(np.int64(math.ceil(share * mass)), 1), mass)


@njit(error_model="numpy")
def mass_before(masses, weights, least, first):  # type: ignore[no-untyped-def]
    """The mass of those before (least, first), heavier or as heavy with a lower id: of ids below first, and of all."""
    lower = mass_from(masses[:first], weights[:first], least)
    return lower, lower + mass_from(masses[first:], weights[first:], least + 1)


@njit(error_model="numpy")
def mass_from(masses, weights, least):  # type: ignore[no-untyped-def]
    """The masses of those that weigh at least `least`."""
    mass, least = np.int64(0), np.int32(least)
    for i in range(masses.shape[0]):
        one = masses[i]  # read in any case: so it compiles to vectors
        mass += one if weights[i] >= least else np.int32(0)
    return mass


@njit(error_model="numpy")
def pick(masses, weights, least, first, bits):  # type: ignore[no-untyped-def]
    """A candidate before (least, first), drawn by its mass with 64 random bits."""
    lower, total = mass_before(masses, weights, least, first)
    # The upper half of the product bits * total, each split into halves of 32 bits: total < 2^62.
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    mass = np.uint64(total)
    low = (bits & mask) * (mass & mask)
    middle = (bits >> half) * (mass & mask) + (low >> half)
    cross = (bits & mask) * (mass >> half) + (middle & mask)
    target = np.int64((bits >> half) * (mass >> half) + (middle >> half) + (cross >> half))  # 0 <= target < total
    if target < lower:
        return passing(masses[:first], weights[:first], least, target)
    return first + passing(masses[first:], weights[first:], least + 1, target - lower)


@njit(error_model="numpy")
def passing(masses, weights, least, target):  # type: ignore[no-untyped-def]
    """The id at which the running mass of those that weigh at least `least` passes the target."""
    start, passed = 0, np.int64(0)
    while start + BLOCK < masses.shape[0]:
        block = mass_from(masses[start : start + BLOCK], weights[start : start + BLOCK], least)
        if passed + block > target:
            break
        passed += block
        start += BLOCK
    for i in range(start, masses.shape[0]):
        passed += masses[i] if weights[i] >= least else np.int32(0)
        if passed > target:
            return i
    return -1


@njit(error_model="numpy")
def random_bits(seed, request, index):  # type: ignore[no-untyped-def]
    """64 random bits: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011)."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & mask, seed >> half
    c0, c1, c2, c3 = index & mask, index >> half, request & mask, request >> half
    for _ in range(10):
        a = np.uint64(0xD2511F53) * c0
        b = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & mask, (a >> half) ^ c3 ^ k1, a & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return (c1 << half) | c0
