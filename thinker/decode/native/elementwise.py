"""What happens to one row between two products: norms, rotation, activations, softmax.

Plain loops without fast-math: every number is computed on its own, so LLVM may use vectors of any width and the bits
stay the same. Sums over a row are in `rows.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .layout import ACTIVATIONS
from .rows import largest, sum_of, sum_of_squares

SILU, GELU, RELU, RELU2 = map(ACTIVATIONS.index, ("silu", "gelu", "relu", "relu2"))


@njit(error_model="numpy")
def exponential(x):  # type: ignore[no-untyped-def]
    """exp(x) in float32 within 2 units in the last place, without a call, so that loops over it become vectors.

    exp(x) = 2^n exp(r) with |r| <= ln(2) / 2. Beyond the range of normal float32 it stays at the range's end.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = (x * np.float32(1.44269504) + np.float32(12582912)) - np.float32(12582912)  # adding 1.5 * 2^23 rounds
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)  # ln(2) in two parts, the first exact times n
    power = np.float32(1 / 5040)
    power = power * r + np.float32(1 / 720)
    power = power * r + np.float32(1 / 120)
    power = power * r + np.float32(1 / 24)
    power = power * r + np.float32(1 / 6)
    power = power * r + np.float32(1 / 2)
    power = power * r * r + r + np.float32(1)
    return power * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@njit(error_model="numpy")
def silu(x):  # type: ignore[no-untyped-def]
    """x times the logistic function of x."""
    return x / (np.float32(1) + exponential(-x))


@njit(error_model="numpy")
def gelu(x):  # type: ignore[no-untyped-def]
    """x times the normal distribution's probability below x, the exact form (arXiv 1606.08415).

    That probability is erfc(z) / 2 with z = |x| / sqrt(2) below zero and one minus it above; erfc(z) is taken as
    t exp(p(t) - z^2) with t = 1 / (1 + z / 2), p fitted with Chebyshev polynomials to 1e-7.
    """
    z = abs(x) * np.float32(0.70710678)
    t = np.float32(1) / (np.float32(1) + np.float32(0.5) * z)
    p = np.float32(0.17778286)
    p = p * t - np.float32(0.85524505)
    p = p * t + np.float32(1.5553532)
    p = p * t - np.float32(1.2091825)
    p = p * t + np.float32(0.3276663)
    p = p * t - np.float32(0.20581637)
    p = p * t + np.float32(0.10139813)
    p = p * t + np.float32(0.37349775)
    p = p * t + np.float32(1.0000585)
    p = p * t - np.float32(1.2655128)
    tail = t * exponential(p - z * z)
    return np.float32(0.5) * x * (np.float32(2) - tail if x > 0 else tail)


@njit(error_model="numpy")
def activate(kind, x):  # type: ignore[no-untyped-def]
    """Apply an activation in place."""
    if kind == SILU:
        for i in range(x.shape[0]):
            x[i] = silu(x[i])
    elif kind == GELU:
        for i in range(x.shape[0]):
            x[i] = gelu(x[i])
    else:
        for i in range(x.shape[0]):
            x[i] = max(x[i], np.float32(0))
        if kind == RELU2:
            for i in range(x.shape[0]):
                x[i] = x[i] * x[i]


@njit(error_model="numpy")
def norm(x, scale, eps, out):  # type: ignore[no-untyped-def]
    """RMSNorm of a row; `out` may be the row itself."""
    factor = np.float32(1) / np.sqrt(sum_of_squares(x) / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * scale[i]


@njit(error_model="numpy")
def rotate(x, y, cos, sin):  # type: ignore[no-untyped-def]
    """RoPE in place: the two halves of a head turn together."""
    for i in range(cos.shape[0]):
        a, b = x[i], y[i]
        x[i] = a * cos[i] - b * sin[i]
        y[i] = b * cos[i] + a * sin[i]


@njit(error_model="numpy")
def softmax(x):  # type: ignore[no-untyped-def]
    """exp(x - largest), divided by the sum of that, in place."""
    top = largest(x)
    for i in range(x.shape[0]):
        x[i] = exponential(x[i] - top)
    factor = np.float32(1) / sum_of(x)
    for i in range(x.shape[0]):
        x[i] = x[i] * factor


@njit(error_model="numpy")
def to_float16(x):  # type: ignore[no-untyped-def]
    """The bits of the nearest float16, of two the even one; beyond its range the largest it has."""
    size = np.float32(min(abs(x), np.float32(65504)))
    bits = np.float32(size).view(np.int32)
    half = (bits - (112 << 23) + 0xFFF + (bits >> 13 & 1)) >> 13  # an exponent that counts from 15 and not from 127
    if size < np.float32(2.0**-14):  # without a leading one: float32 from 1/2 on has the same steps
        half = np.float32(size + np.float32(0.5)).view(np.int32) - (126 << 23)
    return np.int16(half | (0x8000 if x < 0 else 0))
