"""Training of a model with senses: media encoded, spliced into the stream, and the same loss as ever.

`SplicedLoss` stands where `NextTokenLoss` stands without pictures and sounds. Which media a row holds comes with the
batch (`data/packing.py`); how each is changed is drawn from the run's seed and the row's number, so batch k stays a
function of the two. What a run is, and when it is saved, is in `run.py`.
"""

# B rows, T places, D d_model, N positions of media

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..data.chats import Skipped, open_chats
from ..data.media_shards import MediaShards
from ..loss import IGNORE, LossParts, balance_loss, check_targets, cross_entropy_sum
from ..modality.augment import DRAWS
from ..modality.senses import Senses
from ..modality.sequence import splice
from ..modality.settings import KINDS, FeatureConfig, Kind, PictureConfig, SensesConfig, SoundConfig
from ..model import ThinkerLM


class SplicedLoss(nn.Module):
    """A model and its senses together with the loss."""

    def __init__(
        self, model: ThinkerLM, senses: Senses, media: MediaShards, placeholders: Mapping[Kind, int], seed: int
    ) -> None:
        super().__init__()
        self.model, self.senses = model, senses
        self._media, self._placeholders, self._seed = media, placeholders, seed

    def forward(self, tokens: Tensor, targets: Tensor, segments: Tensor, media: Tensor, numbers: Tensor) -> LossParts:
        """tokens, targets, segments and the media's numbers (B, T), and the rows' numbers (B,), -1 to change nothing.

        Other than that as `NextTokenLoss`.
        """
        hidden, router_logits = self.model.features(
            embeddings=self.embed(tokens, media, numbers), segments=segments, return_router=True
        )
        assert isinstance(hidden, Tensor)
        check_targets(targets, hidden, self.model.config.vocab_size)
        # Of a row full of pictures and sounds a fifth is asked: the rest needs no logits.
        asked = targets != IGNORE
        total = cross_entropy_sum(hidden[asked], self.model.head.weight, targets[asked])
        balance = balance_loss(tuple(router_logits), segments != 0, self.model.config.num_experts_per_tok)
        return LossParts(total, asked.sum(), balance.to(total.device))

    def embed(self, tokens: Tensor, media: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Tokens (B, T) as embeddings (B, T, D), with what the senses make of the media in their places."""
        embeddings = self.model.tok_emb(tokens)
        for kind in self.senses.config.kinds:
            where = (tokens == self._placeholders[kind]) & (media > 0)
            found = occurrences(where.cpu().numpy(), media.cpu().numpy())
            if not len(found):
                continue
            draws = None
            if numbers is not None and int(numbers.min()) >= 0:
                draws = draws_for(self._seed, numbers.cpu().numpy()[found[:, 0]], found[:, 1])
            features = self.senses.of(kind)([self._media(kind, number) for number in found[:, 2].tolist()], draws)
            embeddings = splice(embeddings, where, features.to(embeddings.dtype))
        return embeddings


def occurrences(where: np.ndarray, media: np.ndarray) -> np.ndarray:
    """Row, first place and number of each medium in reading order, (M, 3): runs of one number at places of `where`.

    Two media always have an end and a begin token between them.
    """
    shown = np.where(where, media, 0)
    before = np.pad(shown, ((0, 0), (1, 0)))[:, :-1]
    rows, places = np.nonzero((shown > 0) & (shown != before))
    return np.stack([rows, places, shown[rows, places]], axis=1)


def draws_for(seed: int, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) for the media at these places of these rows, float32 (M, 16): a function of all three."""
    drawn = np.empty((len(rows), DRAWS), np.float32)
    for i, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        # 128 bits of key and 256 of counter (Salmon et al. 2011): other rows and places never meet.
        source = np.random.Philox(key=np.array([seed, row], np.uint64), counter=[0, place, 0, 0])
        drawn[i] = (source.random_raw(DRAWS) >> np.uint64(40)) / float(1 << 24)
    return drawn


class Trained(nn.Module):
    """All that a run trains under the names it is saved by: the Thinker's own, and `image.…` and `audio.…`."""

    def __init__(self, model: ThinkerLM, senses: Senses) -> None:
        super().__init__()
        for name, part in [*model.named_children(), *senses.named_children()]:
            self.add_module(name, part)


def senses_for(data: Sequence[str], file: Path | None, taught: SensesConfig | None) -> SensesConfig | None:
    """The senses of a new run: what a file says, else what --init has and the data need; None for text alone."""
    if file is not None:
        return SensesConfig.from_json(file)
    config = taught if taught is not None else SensesConfig.model_validate({})
    for kind, example in first_media(data).items():
        if config.of(kind) is None:
            config = config.model_copy(update={kind: example})
    return config if config.kinds else None


def first_media(data: Sequence[str]) -> dict[Kind, PictureConfig | SoundConfig | FeatureConfig]:
    """The kinds of media in conversations, each with the encoder that suits the first one that can be read."""
    found: dict[Kind, PictureConfig | SoundConfig | FeatureConfig] = {}
    for item in open_chats(data).sides():
        if isinstance(item, Skipped):
            continue
        try:
            media = item[1].media
        except ValueError:  # told of when the corpus is made
            continue
        for medium in media:
            if medium.kind in found:
                continue
            if not medium.holds_features:
                found[medium.kind] = (PictureConfig if medium.kind == "image" else SoundConfig).model_validate({})
                continue
            try:
                width = medium.features().shape[1]
            except ValueError:
                continue
            found[medium.kind] = FeatureConfig.model_validate({"width": width})
        if len(found) == len(KINDS):
            break
    return found
