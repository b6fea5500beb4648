"""A training run: what it consists of, how far it is, and how it is saved.

Everything that going on needs is in the exact state under `training/` (`checkpoint/training.py`); the published view is
made from it. How a run begins and goes on is in `start.py`, its steps are in `loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import training
from ..checkpoint.publish import Publication, publish
from ..config import ThinkerConfig
from ..data.batches import Batches
from ..data.chat_shards import ChatCorpus
from ..data.mixing import MixedBatches
from ..data.packing import PackedBatches
from ..data.shards import Corpus
from ..loss import NextTokenLoss
from ..modality.senses import Senses
from ..modality.sequence import placeholder_ids
from ..model import ThinkerLM
from ..parameters import load_parameters
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .decide import Decisions
from .optim import follow, means_in_place, optimizer_tensors
from .senses import SplicedLoss, Trained

Say = Callable[[str], None]
TrainingBatches = Batches | PackedBatches | MixedBatches


class OutOfMemory(ValueError):
    """Even one row at once takes more than there is; the message says what to try."""


@dataclass(frozen=True)
class Best:
    """The step with the lowest held-out loss so far, and how many looks since then found none lower."""

    step: int
    loss: float
    looks_since: int = 0


@dataclass
class Run:
    """A model in training.

    The mutable part is the model, its optimisers, everything from `step` on, and `decisions`, where memory runs out.
    """

    folder: Path
    config: ThinkerConfig
    settings: TrainConfig
    decisions: Decisions
    corpus: Corpus | ChatCorpus
    model: ThinkerLM
    optimizers: list[torch.optim.Optimizer]
    batches: TrainingBatches
    scaler: torch.amp.GradScaler
    publication: Publication
    senses: Senses | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in steps, over all processes that worked on this run
    best: Best | None = None  # where held-out loss steers the run
    looked: tuple[int, float] | None = None  # step and held-out loss of the last look
    saved: int | None = None  # the step of the newest state
    module: NextTokenLoss | SplicedLoss = field(init=False)
    trained: nn.Module = field(init=False)  # all parameters under the names they are saved by

    def __post_init__(self) -> None:
        self.module = loss_of(self.model, self.senses, self.corpus, self.settings)
        self.trained = self.model if self.senses is None else Trained(self.model, self.senses)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus and of the model."""
        return self.corpus.tokenizer

    def progress(self) -> float:
        """The share of the run that is done, which the schedule follows: steps or, with minutes, time."""
        steps, seconds = self.settings.limit
        return self.step / steps if steps is not None else self.seconds / (seconds or 1)

    def count(self, tokens: int, seconds: float) -> None:
        """A step is done: the counters go on, and so do the parameters' means, if the settings want any."""
        before = self.progress()
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        if self.settings.average:
            after = self.progress()
            # Over what has been run so far, until that is more than the share wanted.
            share = (after - before) / min(after, self.settings.average) if after else 1.0
            follow(self.optimizers, min(share, 1.0))

    def shown(self) -> AbstractContextManager[None]:
        """Inside the block the model is the one that would be published now."""
        return means_in_place(self.optimizers)

    @property
    def published_step(self) -> int:
        """The step whose parameters others see at the end: the best one, where held-out loss steers."""
        return self.step if self.best is None else self.best.step

    @property
    def looked_at_this_step(self) -> bool:
        """Whether held-out loss has just been measured."""
        return self.looked is not None and self.looked[0] == self.step

    @property
    def overfits(self) -> bool:
        """Whether held-out loss has not fallen for as many looks as the settings wait."""
        patience = self.settings.early_stop
        return patience > 0 and self.best is not None and self.best.looks_since >= patience

    @property
    def micro_batches(self) -> int:
        """How many parts a step's rows go through the model in: the settings' batches, split as memory asked for."""
        return self.settings.accumulate * self.decisions.split

    @property
    def rows_at_once(self) -> int:
        """The rows of the largest micro-batch."""
        return -(-self.settings.batch_size * self.settings.accumulate // self.micro_batches)

    def halve(self) -> None:
        """From here on half the rows at once and twice the micro-batches; the step's rows stay. Recorded on saving.

        Raises `OutOfMemory` when there is only one row left to halve.
        """
        if self.rows_at_once == 1:
            raise OutOfMemory(
                f"out of memory at step {self.step + 1} with 1 row of ctx_len {self.config.ctx_len} at once: try "
                "--checkpoint-activations, a smaller --ctx-len, --d-model or --n-layers, or free memory"
            )
        split = min(2 * self.decisions.split, self.settings.batch_size)
        self.decisions = replace(self.decisions, split=split)
        reason = f"{self.rows_at_once} rows at once from step {self.step + 1} on: the memory was not enough for more"
        self.decisions = replace(self.decisions, reasons=(*self.decisions.reasons, reason))

    def save(self) -> None:
        """Write the exact state, then publish from it."""
        training.save(
            self.folder,
            self.step,
            parameters={name: as_numpy(p) for name, p in self.model.named_parameters()},
            optimizer={name: as_numpy(t) for name, t in optimizer_tensors(self.trained, self.optimizers).items()},
            state={
                "config": self.config.model_dump(exclude_none=True),
                "settings": self.settings.model_dump(mode="json", exclude_none=True),
                "decisions": self.decisions.to_json(),
                "publication": self.publication.to_json(),
                "corpus": fingerprint_of(self.corpus, self.batches),
                "senses": None if self.senses is None else self.senses.config.to_json(),
                "scaler": self.scaler.state_dict(),
                "tokens": self.tokens,
                "seconds": self.seconds,
                "best": None if self.best is None else asdict(self.best),
            },
            tokenizer_json=self.tokenizer.to_json(),
            modality=None if self.senses is None else {n: as_numpy(p) for n, p in self.senses.named_parameters()},
            keep=self.settings.keep,
        )
        self.saved = self.step
        publish(self.folder)

    def take_published(self, say: Say) -> None:
        """At the end: put the parameters that others see into the model; say so if they are another step's."""
        path = training.to_publish(self.folder)
        another = self.best is not None and self.best.step != self.step
        if path is None or not (another or self.settings.average):
            return
        published = training.load(path)
        load_parameters(self.model, published.shown, str(path))
        if self.best is None or not another:
            return
        if self.senses is not None and published.modality is not None:
            load_parameters(self.senses, published.modality, str(path))
        self.looked = None
        early = "ended early, after" if self.overfits else "of"
        say(
            f"published: step {self.best.step:,}, where held-out loss was lowest ({self.best.loss:.3f}), {early} "
            f"{self.step:,} steps"
            f"{'; to go on to the end all the same: --resume --early-stop 0' if self.overfits else ''}"
        )


def loss_of(
    model: ThinkerLM, senses: Senses | None, corpus: Corpus | ChatCorpus, settings: TrainConfig
) -> NextTokenLoss | SplicedLoss:
    """The module that training wraps."""
    if senses is None or not isinstance(corpus, ChatCorpus) or corpus.media is None:
        return NextTokenLoss(model)
    return SplicedLoss(model, senses, corpus.media, placeholder_ids(corpus.tokenizer), settings.seed)


def fingerprint_of(corpus: Corpus | ChatCorpus, batches: TrainingBatches) -> str:
    """Of all that a run learns from."""
    return f"{corpus.fingerprint} {batches.fingerprint}" if isinstance(batches, MixedBatches) else corpus.fingerprint


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values on the host, without its history."""
    return tensor.detach().cpu().numpy()
