"""The senses of one model: an encoder and a projector for each kind of medium, and what they make of a batch of media.

Parameters are named by kind, `image.encoder.…` and `audio.projector.…`; files of them are `checkpoint/`'s business.
"""

# B media of one kind, N positions of all of them, D d_model

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..parameters import load_parameters
from .audio import SoundEncoder
from .augment import changed_pictures, changed_sounds
from .projector import Projector
from .settings import FeatureConfig, Kind, PictureConfig, SensesConfig, SoundConfig
from .vision import PictureEncoder

HEARD_AT_ONCE = 16  # recordings


class Sense(nn.Module):
    """One encoder, None where features come from elsewhere, and its projector."""

    def __init__(self, config: PictureConfig | SoundConfig | FeatureConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.encoder: PictureEncoder | SoundEncoder | None = None
        if isinstance(config, PictureConfig):
            self.encoder = PictureEncoder(config)
        elif isinstance(config, SoundConfig):
            self.encoder = SoundEncoder(config)
        self.projector = Projector(config.projector, config.width, d_model)
        if config.projector.frozen:
            self.projector.requires_grad_(False)
        if self.encoder is not None and not isinstance(config, FeatureConfig) and config.frozen:
            self.encoder.requires_grad_(False)

    def encode(self, media: Sequence[np.ndarray], draws: np.ndarray | None = None) -> Tensor:
        """Prepared media (`Medium.prepared`) to the encoder's features (N, width), one medium's after the other's.

        draws (B, 16) in [0, 1): the media are changed by them first, as in training.
        """
        device = self.projector.out.weight.device
        if isinstance(self.encoder, PictureEncoder):
            pixels = torch.from_numpy(np.stack(media))
            if draws is not None and self.encoder.config.augment:
                pixels = changed_pictures(pixels, torch.from_numpy(draws))
            return self.encoder(pixels.to(device)).flatten(0, 1)
        if isinstance(self.encoder, SoundEncoder):
            features: list[Tensor] = [torch.empty(0)] * len(media)
            for some in alike(media):
                chosen = draws[some] if draws is not None else None
                for i, one in zip(some, self._heard(self.encoder, [media[i] for i in some], chosen), strict=True):
                    features[i] = one
            return torch.cat(features)
        return torch.from_numpy(np.concatenate(media)).to(device)

    def _heard(self, encoder: SoundEncoder, media: Sequence[np.ndarray], draws: np.ndarray | None) -> list[Tensor]:
        """The features of each recording."""
        device = self.projector.out.weight.device
        lengths = torch.tensor([len(one) for one in media])
        frames = torch.zeros(len(media), int(lengths.max()), media[0].shape[1])
        for row, one in enumerate(media):
            frames[row, : len(one)] = torch.from_numpy(np.array(one))
        if draws is not None and encoder.config.augment:
            frames = changed_sounds(frames, lengths, torch.from_numpy(draws))
        features, real = encoder(frames.to(device), lengths.to(device))
        return list(features[real].split(real.sum(dim=1).tolist()))

    def forward(self, media: Sequence[np.ndarray], draws: np.ndarray | None = None) -> Tensor:
        """Prepared media to embeddings (N, D), in order."""
        return self.projector(self.encode(media, draws))


def alike(media: Sequence[np.ndarray]) -> list[list[int]]:
    """Which recordings go through the encoder together: those of like length, so that little of it is padding."""
    order = sorted(range(len(media)), key=lambda i: len(media[i]))
    return [order[start : start + HEARD_AT_ONCE] for start in range(0, len(order), HEARD_AT_ONCE)]


class Senses(nn.Module):
    """All senses of a model, by kind."""

    def __init__(self, config: SensesConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        for kind in config.kinds:
            self.add_module(kind, Sense(config.needed(kind), d_model))

    def of(self, kind: Kind) -> Sense:
        """One of them. Raises `ValueError` if the model lacks it."""
        self.config.needed(kind)
        sense = self.get_submodule(kind)
        assert isinstance(sense, Sense)
        return sense


def take_over(senses: Senses, config: SensesConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Begin with what another model has learned, for each sense that is built in the same way there."""
    for kind in senses.config.kinds:
        ours, theirs = senses.config.needed(kind), config.of(kind)
        if theirs is None or ours.structure() != theirs.structure():
            continue
        own = {name: values for name, values in tensors.items() if name.startswith(f"{kind}.")}
        load_parameters(senses.of(kind), {name.partition(".")[2]: values for name, values in own.items()}, kind)
