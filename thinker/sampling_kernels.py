"""The compiled half of `sampling.py`: logits to one token, in plain loops over whole numbers.

Weights of candidates are whole numbers (probability relative to the largest, times 2^30): their sums are exact in any
order, and nothing is sorted, because bisection finds the border of top-k and top-p. What is less likely than the
likeliest candidate by a factor of 2^31 is never drawn. What the settings mean is said in `sampling.py`.
"""

# V vocab_size, n texts drawn for together

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .compiled.memory import doubles, floats, integers, marks, unsigned, words
from .sampling import INDEX, MIN_P, PENALTY, REQUEST, SEED, TEMPERATURE, TEMPERATURE_LAST, TOP_K, TOP_P

ONE = 1 << 30  # the weight of the likeliest candidate
LOWEST = -(1 << 31)  # the rank of what can't be drawn
BLOCK = 64  # candidates looked through at once
LOOKS = 4  # before a bisection leaves behind what its border can't be among


def draw_rows(slots, n, logits, V, settings, keys, seen, scratch, tokens):  # type: ignore[no-untyped-def]
    """Draw for each of n rows; -1 marks a row without a finite logit. All but n and V are addresses."""
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
    if largest != LOWEST:
        if settings[TEMPERATURE] == 0:
            token = first_equal(order, largest)
        else:
            least = truncate(scores, order, weights, largest, settings)
            token = pick(weights, least, random_bits(key[SEED], key[REQUEST], key[INDEX]))
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
def truncate(scores, order, weights, largest, settings):  # type: ignore[no-untyped-def]
    """Weigh the candidates; top-k, top-p and min-p leave those that weigh at least what this returns."""
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
    least = np.int64(1)
    if settings[TOP_P] < 1:
        least = least_in_mass(weights, settings[TOP_P], order)
    least = max(least, np.int64(math.ceil(settings[MIN_P] * ONE)))
    if last:
        for i in range(scores.shape[0]):
            scores[i] = scores[i] if weights[i] >= least else np.float32(-np.inf)
        weigh(scores, top, temperature, weights)
        least = np.int64(1)
    return least


@njit(error_model="numpy")
def weigh(scores, top, temperature, weights):  # type: ignore[no-untyped-def]
    """exp((score - top) / temperature) times 2^30, rounded to whole numbers."""
    # exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, exp(r) by its Taylor series: plain arithmetic that compiles to vectors.
    for i in range(scores.shape[0]):
        x = (scores[i] - top) / temperature
        x = x if x > np.float32(-30) else np.float32(-30)  # NaN and -inf too; exp(-30) 2^30 rounds to 0
        n = np.int32(x * np.float32(1.44269504) - np.float32(0.5))  # towards zero: to the nearest, as x <= 0
        r = x - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.12194440e-4)
        power = np.float32(1 / 5040)
        power = power * r + np.float32(1 / 720)
        power = power * r + np.float32(1 / 120)
        power = power * r + np.float32(1 / 24)
        power = power * r + np.float32(1 / 6)
        power = power * r + np.float32(1 / 2)
        power = power * r + np.float32(1)
        power = power * r + np.float32(1)
        scale = np.int32((n + 157) << 23).view(np.float32)  # 2^(n + 30) by its bits
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
def least_in_mass(weights, share, space):  # type: ignore[no-untyped-def]
    """From which weight on the fewest largest candidates reach a share of the sum (arXiv 1904.09751).

    Equals at the border beyond those that are needed get weight 0.
    """
    low, high = np.int64(1), np.int64(ONE + 1)
    enough, less = mass_from(weights, low), np.int64(0)  # the sums from `low` and from `high` on
    wanted = min(max(np.int64(math.ceil(share * enough)), 1), enough)
    left, beyond, looks = weights, np.int64(0), 0
    # The geometric middle, as weights span nine decades; done when a single candidate, or equals, are left between.
    while high - low > 1 and enough - less >= 2 * low:
        middle = min(max(np.int64(math.sqrt(low * high)), low + 1), high - 1)
        mass = beyond + mass_from(left, middle)
        if mass >= wanted:
            low, enough = middle, mass
        else:
            high, less = middle, mass
        looks += 1
        if looks % LOOKS == 0:
            left, beyond = space[: keep_between(left, low, high, space)], less
    needed = -((less - wanted) // low)
    if enough - less >= (needed + 1) * low:
        for i in range(weights.shape[0]):
            if weights[i] == low:
                needed -= 1
                if needed < 0:
                    weights[i] = 0
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
def mass_from(weights, least):  # type: ignore[no-untyped-def]
    """The sum of the weights that are at least `least`."""
    mass, least = np.int64(0), np.int32(least)
    for i in range(weights.shape[0]):
        mass += weights[i] if weights[i] >= least else np.int32(0)
    return mass


@njit(error_model="numpy")
def pick(weights, least, bits):  # type: ignore[no-untyped-def]
    """The candidate at which the running sum of the weights passes a uniform random part of their total."""
    total = mass_from(weights, least)
    # The upper half of the product bits * total, each split into halves of 32 bits: total < 2^62.
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    mass = np.uint64(total)
    low = (bits & mask) * (mass & mask)
    middle = (bits >> half) * (mass & mask) + (low >> half)
    cross = (bits & mask) * (mass >> half) + (middle & mask)
    target = np.int64((bits >> half) * (mass >> half) + (middle >> half) + (cross >> half))  # 0 <= target < total
    start, passed, least = 0, np.int64(0), np.int32(least)
    while start + BLOCK < weights.shape[0]:
        block = np.int64(0)
        for i in range(start, start + BLOCK):
            block += weights[i] if weights[i] >= least else np.int32(0)
        if passed + block > target:
            break
        passed += block
        start += BLOCK
    for i in range(start, weights.shape[0]):
        passed += weights[i] if weights[i] >= least else np.int32(0)
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
