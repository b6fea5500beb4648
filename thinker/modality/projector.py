"""From an encoder's width to the stream's: linear, or two layers with an activation. No encoder lives here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..model import RMSNorm
from .settings import ProjectorConfig

EPS = 1e-6


class Projector(nn.Module):
    """Features (…, width) to embeddings (…, d_model). The input is normed, whatever scale an encoder has."""

    def __init__(self, config: ProjectorConfig, width: int, d_model: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, EPS)
        hidden = config.hidden if config.hidden is not None else d_model
        two = config.kind == "mlp"
        self.up = nn.Linear(width, hidden, bias=False) if two else None
        self.out = nn.Linear(hidden if two else width, d_model, bias=False)
        for layer in (self.up, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """(…, width) to (…, d_model)."""
        x = self.norm(features)
        if self.up is not None:
            x = F.gelu(self.up(x))
        return self.out(x)
