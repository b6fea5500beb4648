"""The encoder of sound: log-mel frames, two strided convolutions, a few non-causal blocks (as in arXiv 2212.04356).

Opening files and the spectrogram are `sounds.py`'s, the way into the stream the projector's. Recordings of unequal
length share a batch; each gives what it gives alone.
"""

# B recordings, F frames of the longest, M mel bands, L = F / 4 positions, W width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Block, RMSNorm, RotaryEmbedding
from .settings import AUDIO_STRIDE, SoundConfig
from .vision import initialise


class SoundEncoder(nn.Module):
    """Log-mel frames (B, F, M), zeros behind each recording's own, to features (B, L, W), four frames a position."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config = config
        blocks = config.blocks(config.width, config.max_positions)
        self.first = nn.Conv1d(config.mels, config.width, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1, bias=False)
        self.rope = RotaryEmbedding(blocks)
        self.blocks = nn.ModuleList(Block(blocks, layer, causal=False) for layer in range(blocks.n_layers))
        self.norm = RMSNorm(config.width, blocks.norm_eps)
        initialise(self)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and which of them are a recording's, bool (B, L). lengths (B,) counts each one's frames.

        Raises `ValueError` for another number of bands, and beyond max_seconds.
        """
        if frames.shape[-1] != self.config.mels:
            raise ValueError(f"frames have {frames.shape[-1]} mel bands, the encoder takes {self.config.mels}")
        positions = -(-lengths // AUDIO_STRIDE)
        longest = int(positions.max())
        if longest > self.config.max_positions:
            raise ValueError(
                f"{longest} positions of sound exceed the {self.config.max_positions} of max_seconds "
                f"{self.config.max_seconds:g}"
            )
        x = F.pad(frames, (0, 0, 0, longest * AUDIO_STRIDE - frames.shape[1]))
        x = F.gelu(self.first(x.transpose(1, 2).to(self.first.weight.dtype)))  # (B, W, 2 L)
        # What lies behind the end must be as empty beside a longer recording as it is alone.
        inside = torch.arange(x.shape[-1], device=x.device) < 2 * positions[:, None]
        x = F.gelu(self.second(x * inside[:, None])).transpose(1, 2)  # (B, L, W)
        real = torch.arange(x.shape[1], device=x.device) < positions[:, None]
        visible = (real[:, None, None, :]).expand(-1, 1, x.shape[1], -1)  # a row always has its first position to see
        rotation = self.rope(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x, _ = block(x, rotation, visible)
        return self.norm(x), real
