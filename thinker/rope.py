"""The angles of rotary position embedding (RoPE, arXiv 2104.09864), computed once for torch and native code alike.

Half-split convention, as Hugging Face has it: dimension i turns together with dimension i + head_dim / 2. What applies
the angles to q and k lives with the arithmetic that uses it: `attention.rotate` in torch, the kernels in native code.
"""

from __future__ import annotations

import numpy as np

from .config import ThinkerConfig


def inverse_frequencies(config: ThinkerConfig) -> np.ndarray:
    """Radians per position of each pair: (head_dim / 2,) float32.

    Every step is rounded where transformers rounds it. At position 2000 the last bit of a frequency is 1e-4 radians:
    logits would differ by more than is promised between implementations, however exact ours were.
    """
    width, one = config.head_width, np.float32(1)
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequency = one / np.power(config.rope_theta, exponent, dtype=np.float64).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Waves that turn often within the original context stay, slow ones are stretched, and between them it blends.
    wave = one / frequency * np.float32(2 * np.pi)
    turns = one / wave * np.float32(scaling.original_ctx_len)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - np.float32(low)) / np.float32(high - low), np.float32(0), one)
    return (one - blend) * frequency / np.float32(scaling.factor) + blend * frequency


def rope_tables(config: ThinkerConfig, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine for positions 0 to length - 1 (default `ctx_len`): two arrays (length, head_dim / 2) float32."""
    positions = np.arange(config.ctx_len if length is None else length, dtype=np.float32)
    angles = np.outer(positions, inverse_frequencies(config)).astype(np.float32)
    return np.cos(angles, dtype=np.float64).astype(np.float32), np.sin(angles, dtype=np.float64).astype(np.float32)
