"""The angles of rotary position embedding (RoPE, arXiv 2104.09864), computed once for torch and native code alike.

Half-split convention, as Hugging Face has it: dimension i turns together with dimension i + head_dim / 2. What applies
the angles to q and k lives with the arithmetic that uses it: `attention.rotate` in torch, the kernels in native code.
"""

from __future__ import annotations

import numpy as np

from .config import ThinkerConfig


def inverse_frequencies(config: ThinkerConfig) -> np.ndarray:
    """Radians per position of each pair: (head_dim / 2,) float32."""
    width = config.head_width
    exponent = np.arange(0, width, 2, dtype=np.float64) / width
    frequency = (1.0 / config.rope_theta**exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Waves that turn often within the original context stay, slow ones are stretched, and between them it blends.
    turns = scaling.original_ctx_len * frequency / np.float32(2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return ((1 - blend) * frequency / np.float32(scaling.factor) + blend * frequency).astype(np.float32)


def rope_tables(config: ThinkerConfig, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine for positions 0 to length - 1 (default `ctx_len`): two arrays (length, head_dim / 2) float32."""
    positions = np.arange(config.ctx_len if length is None else length, dtype=np.float32)
    angles = np.outer(positions, inverse_frequencies(config)).astype(np.float32)
    return np.cos(angles, dtype=np.float64).astype(np.float32), np.sin(angles, dtype=np.float64).astype(np.float32)
