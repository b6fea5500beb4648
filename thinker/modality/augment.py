"""Pictures and recordings a little changed, so that an encoder learns the thing and not its samples.

Every change is a function of draws that the caller made, so that a run repeats. Pictures are moved, turned and scaled;
recordings get another tempo and another voice (the mel axis stretched: vocal tract length perturbation, Jaitly and
Hinton 2013), and lose bands and moments (SpecAugment, arXiv 1904.08779).
"""

# B media, H height or frames, W width or bands, C channels

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 16  # numbers in [0, 1) that one change takes


def changed_pictures(pixels: Tensor, draws: Tensor) -> Tensor:
    """Pixels uint8 (B, H, W, C) moved by up to 8 %, turned by up to 12°, scaled by up to 12 %: float of that shape.

    draws (B, 16) in [0, 1).
    """
    signed = 2 * draws - 1
    angle, scale = signed[:, 0] * math.radians(12), 1 + 0.12 * signed[:, 1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, -sin, 0.16 * signed[:, 2], sin, cos, 0.16 * signed[:, 3]]
    grid = F.affine_grid(torch.stack(rows, dim=-1).view(-1, 2, 3), [len(pixels), 1, *pixels.shape[1:3]], False)
    planes = pixels.float().permute(0, 3, 1, 2)
    return F.grid_sample(planes, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)


def changed_sounds(frames: Tensor, lengths: Tensor, draws: Tensor) -> Tensor:
    """Log-mel frames (B, H, W), each of its length (B,), at another tempo, pitch and place, with gaps: as many frames.

    draws (B, 16) in [0, 1).
    """
    B, H, W = frames.shape
    signed = 2 * draws - 1
    size = lengths.float()[:, None]
    places = torch.arange(H)[None].float()
    tempo, moved = 1 + 0.12 * signed[:, :1], 0.05 * signed[:, 1:2] * size
    time = (places - size / 2) * tempo + size / 2 + moved  # (B, H), in frames
    bands = torch.arange(W)[None].float() * (1 + 0.12 * signed[:, 2:3]) + 1.0 * signed[:, 3:4]  # (B, W)
    across = (2 * bands / max(W - 1, 1) - 1)[:, None].expand(B, H, W)
    # Beyond its ends a recording stays as it is there.
    down = (2 * torch.minimum(time.clamp(min=0), size - 1) / max(H - 1, 1) - 1)[:, :, None].expand(B, H, W)
    grid = torch.stack([across, down], dim=-1)
    y = F.grid_sample(frames[:, None], grid, padding_mode="border", align_corners=True)[:, 0]
    keep = torch.ones(B, H, W, dtype=torch.bool)
    for i in (4, 6):
        width = 0.1 * W * draws[:, i : i + 1]
        start = draws[:, i + 1 : i + 2] * (W - width)
        band = torch.arange(W)[None]
        keep &= ~((band >= start) & (band < start + width))[:, None, :]
    width = 0.1 * size * draws[:, 8:9]
    start = draws[:, 9:10] * (size - width)
    keep &= ~((places >= start) & (places < start + width))[:, :, None]
    tilt = 0.3 * signed[:, 10:11] * torch.linspace(-1, 1, W)[None]
    louder = 0.2 * signed[:, 11:12]
    y = (y * (1 + 0.15 * signed[:, 12:13])[:, :, None] + (tilt + louder)[:, None, :]) * keep
    return y * (places < size)[:, :, None]
