"""The encoder of pictures: patches, and a few non-causal blocks made of the Thinker's own parts (arXiv 2010.11929).

Opening and scaling files is `pictures.py`'s, the way into the stream the projector's.
"""

# B pictures, S side in pixels, C channels, P patches, W width

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import Block, RMSNorm, RotaryEmbedding
from .settings import PictureConfig


class PictureEncoder(nn.Module):
    """Pixels (B, S, S, C), uint8 or float 0 to 255, to features (B, P, W), row by row from the top left."""

    def __init__(self, config: PictureConfig) -> None:
        super().__init__()
        self.config = config
        blocks = config.blocks(config.width, config.positions)
        self.embed = nn.Linear(config.patch**2 * config.channels, config.width, bias=False)
        # RoPE counts patches in reading order; rows and columns are told by this.
        self.position = nn.Parameter(torch.empty(config.positions, config.width))
        self.rope = RotaryEmbedding(blocks)
        self.blocks = nn.ModuleList(Block(blocks, layer, causal=False) for layer in range(blocks.n_layers))
        self.norm = RMSNorm(config.width, blocks.norm_eps)
        initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of every patch. Raises `ValueError` for pictures of another size."""
        side, patch = self.config.size, self.config.patch
        if pixels.shape[1:] != (side, side, self.config.channels):
            raise ValueError(
                f"pictures are {tuple(pixels.shape[1:])}, the encoder takes {(side, side, self.config.channels)}"
            )
        x = pixels.to(self.embed.weight.dtype) / 127.5 - 1
        x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (B, rows, patch, columns, patch, C)
        x = self.embed(x.transpose(2, 3).flatten(3).flatten(1, 2)) + self.position  # (B, P, W)
        rotation = self.rope(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x, _ = block(x, rotation)
        return self.norm(x)


@torch.no_grad()
def initialise(encoder: nn.Module) -> None:
    """As the Thinker begins: blocks that add nothing yet, all other matrices keep the scale of what they are given."""
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1:
            continue
        if "out_proj" in name or "down_proj" in name:
            parameter.zero_()
        elif name == "position":
            parameter.normal_(std=0.5)  # as loud as what stands there: a place nobody hears of is learned late
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
