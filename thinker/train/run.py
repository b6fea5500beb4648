"""A training run: what it consists of, how it begins, goes on, and is saved.

Everything that going on needs is in the exact state under `training/` (`checkpoint/training.py`); the published view is
made from it. The steps themselves are in `train/loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..chat import DEFAULT_TEMPLATE, ChatFormat
from ..checkpoint import training
from ..checkpoint.publish import Publication, publish
from ..config import ThinkerConfig
from ..data.batches import Batches
from ..data.chat_shards import ChatCorpus, prepare_chats
from ..data.packing import PackedBatches
from ..data.shards import Corpus, prepare
from ..formats import Q8Tensor, open_model
from ..llm import load_parameters
from ..loss import NextTokenLoss
from ..model import ThinkerLM
from ..tokenizer import Tokenizer
from .chats import chat_format, ending_turns, with_turns
from .config import TrainConfig
from .decide import Decisions, choose_device, decide
from .memory import checkpoint_activations
from .optim import build_optimizers, optimizer_tensors, restore_optimizers

Say = Callable[[str], None]

# What may be changed when a run goes on: its length and what is shown and kept, nothing that steers its steps.
FREE_ON_RESUME = {"out", "resume", "steps", "minutes", "validate_every", "save_every", "keep", "prompt", "tensorboard"}
# What --init may change of the architecture: nothing that the tensors' shapes or meaning depend on.
FREE_ON_INIT = {"dropout", "ctx_len", "balance_loss"}


@dataclass
class Run:
    """A model in training. The mutable part is the model, its optimisers, and the three counters."""

    folder: Path
    config: ThinkerConfig
    settings: TrainConfig
    decisions: Decisions
    corpus: Corpus | ChatCorpus
    model: ThinkerLM
    optimizers: list[torch.optim.Optimizer]
    batches: Batches | PackedBatches
    scaler: torch.amp.GradScaler
    publication: Publication
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in steps, over all processes that worked on this run
    module: NextTokenLoss = field(init=False)

    def __post_init__(self) -> None:
        self.module = NextTokenLoss(self.model)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus and of the model."""
        return self.corpus.tokenizer

    def progress(self) -> float:
        """The share of the run that is done, which the schedule follows: steps or, with minutes, time."""
        steps, seconds = self.settings.limit
        return self.step / steps if steps is not None else self.seconds / (seconds or 1)

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

        Raises `ValueError` when there is only one row left to halve.
        """
        if self.rows_at_once == 1:
            raise ValueError(
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
            optimizer={name: as_numpy(t) for name, t in optimizer_tensors(self.model, self.optimizers).items()},
            state={
                "config": self.config.model_dump(exclude_none=True),
                "settings": self.settings.model_dump(mode="json", exclude_none=True),
                "decisions": self.decisions.to_json(),
                "publication": self.publication.to_json(),
                "corpus": self.corpus.fingerprint,
                "scaler": self.scaler.state_dict(),
                "tokens": self.tokens,
                "seconds": self.seconds,
            },
            tokenizer_json=self.tokenizer.to_json(),
            keep=self.settings.keep,
        )
        publish(self.folder)


def begin(config: ThinkerConfig, settings: TrainConfig, given: set[str], say: Say) -> Run:
    """A new run: its corpus, its model, and what it decides about the machine.

    `given` names the fields that a person set. Raises `ValueError` for what can't be trained, before anything is
    written.
    """
    folder = settings.folder
    if training.latest(folder) is not None:
        raise ValueError(f"{folder} already holds a run: go on with --resume, or name another folder with --out")
    if settings.init is None:
        parameters = None
        corpus = corpus_of(settings, config, settings.tokenizer, None, say)
        config = config.changed(vocab_size=corpus.tokenizer.vocab_size)
        publication = own_publication(corpus.tokenizer)
    else:
        config, parameters, tokenizer, publication = starting_point(settings.init, config, given)
        if settings.chat:
            config, parameters, tokenizer, publication = with_turns(config, parameters, tokenizer, publication)
        corpus = corpus_of(settings, config, tokenizer, publication, say)
    if isinstance(corpus, ChatCorpus):
        publication = ending_turns(publication, corpus.chat_format)
    torch.manual_seed(settings.seed)
    model = ThinkerLM(config)
    if parameters is not None:
        load_parameters(model, parameters)
    device = choose_device(settings.device)
    model.to(device)
    batches = corpus.batches(settings.batch_size * settings.accumulate, config.ctx_len, settings.seed)
    one_row = tuple(torch.from_numpy(part[:1]).to(device) for part in batches.batch(0))
    decisions = decide(settings, NextTokenLoss(model), one_row, device)
    for reason in decisions.reasons:
        say(reason)
    return assemble(folder, config, settings, decisions, corpus, model, batches, publication)


def own_publication(tokenizer: Tokenizer) -> Publication:
    """What is published of a model with a tokenizer of this project's own."""
    return Publication(
        bos_id=tokenizer.bos_id,
        eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
        add_bos=tokenizer.bos_id is not None,
        chat_template=DEFAULT_TEMPLATE,
    )


def corpus_of(
    settings: TrainConfig,
    config: ThinkerConfig,
    tokenizer: Tokenizer | str,
    publication: Publication | None,
    say: Say,
) -> Corpus | ChatCorpus:
    """The run's text or conversations as tokens. A model that is yet to be made has no publication."""
    if not settings.chat:
        return prepare(settings.data, tokenizer, config.vocab_size, config.ctx_len + 1, say)

    def written_by(tokenizer: Tokenizer) -> ChatFormat:
        return chat_format(tokenizer, publication if publication is not None else own_publication(tokenizer))

    return prepare_chats(settings.data, tokenizer, written_by, config.ctx_len, config.vocab_size, say)


def resume(wanted: ThinkerConfig, settings: TrainConfig, given: set[str], say: Say) -> Run:
    """Go on from the newest complete state in the run's folder, with its own settings and decisions.

    Raises `ValueError` when there is none, when a setting is given that would steer its steps, or its text has changed.
    """
    folder = settings.folder
    newest = training.latest(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no state to go on from: leave out --resume to start there")
    saved = training.load(newest)
    config, state = saved.config, saved.state
    old = TrainConfig.model_validate(state["settings"])
    for name in sorted(given - FREE_ON_RESUME):
        had, asked = (config, wanted) if name in ThinkerConfig.model_fields else (old, settings)
        if getattr(asked, name) != getattr(had, name):
            raise ValueError(
                f"{folder}: {name} is {getattr(had, name)!r} in this run and can't be changed with --resume: drop it"
            )
    changes = {name: getattr(settings, name) for name in given & FREE_ON_RESUME & set(TrainConfig.model_fields)}
    if {"steps", "minutes"} & changes.keys():
        changes = {"steps": None, "minutes": None} | changes
    settings = old.changed(**changes | {"out": folder})
    if saved.tokenizer_json is None:
        raise ValueError(f"{newest}: has no tokenizer.json: take an older state, by removing this one")
    tokenizer = Tokenizer.from_json(saved.tokenizer_json)
    publication = Publication.from_json(state["publication"], str(newest))
    corpus = corpus_of(settings, config, tokenizer, publication, say)
    if corpus.fingerprint != state["corpus"]:
        raise ValueError(
            f"{folder}: the text of {', '.join(settings.data)} has changed since: begin a new run with --out"
        )
    decisions = Decisions.from_json(state["decisions"])
    model = ThinkerLM(config)
    load_parameters(model, saved.parameters)
    model.to(decisions.device)
    batches = corpus.batches(settings.batch_size * settings.accumulate, config.ctx_len, settings.seed)
    run = assemble(folder, config, settings, decisions, corpus, model, batches, publication)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in saved.optimizer.items()}
    restore_optimizers(model, run.optimizers, tensors)
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.tokens, run.seconds = saved.step, state["tokens"], state["seconds"]
    say(f"going on from step {run.step:,}")
    return run


def assemble(
    folder: Path,
    config: ThinkerConfig,
    settings: TrainConfig,
    decisions: Decisions,
    corpus: Corpus | ChatCorpus,
    model: ThinkerLM,
    batches: Batches | PackedBatches,
    publication: Publication,
) -> Run:
    """A run at step 0 from its parts."""
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    optimizers = build_optimizers(
        model,
        optimizer=settings.optimizer,
        lr=settings.lr,
        muon_lr=settings.muon_lr,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        muon_dtype=torch.bfloat16 if decisions.precision == "bfloat16" else torch.float32,
    )
    scaler = torch.amp.GradScaler(torch.device(decisions.device).type, enabled=decisions.precision == "float16")
    return Run(folder, config, settings, decisions, corpus, model, optimizers, batches, scaler, publication)


def starting_point(
    path: str, wanted: ThinkerConfig, given: set[str]
) -> tuple[ThinkerConfig, Mapping[str, np.ndarray | Q8Tensor], Tokenizer, Publication]:
    """Architecture, parameters, tokenizer and what is published beside them, of the model that --init names.

    A Thinker run gives its exact, unfolded parameters; any other model what it has published. Raises `ValueError` when
    a flag asks for another architecture than the model has.
    """
    files = open_model(path)
    parameters: Mapping[str, np.ndarray | Q8Tensor]
    config, parameters, tokenizer_json = files.config, files.tensors, files.tokenizer_json
    newest = training.latest(Path(path))
    if newest is not None:
        saved = training.load(newest)
        config, parameters, tokenizer_json = saved.config, saved.parameters, saved.tokenizer_json
    if tokenizer_json is None:
        raise ValueError(f"{path}: has no tokenizer.json, which --init needs: put the model's own beside its weights")
    fields = given & set(ThinkerConfig.model_fields)
    for name in sorted(fields - FREE_ON_INIT):
        if getattr(wanted, name) != getattr(config, name):
            raise ValueError(
                f"{path}: {name} is {getattr(config, name)!r} there and {getattr(wanted, name)!r} was asked for: "
                "drop the setting, or train from nothing"
            )
    changes = {name: getattr(wanted, name) for name in fields & FREE_ON_INIT}
    tokenizer = Tokenizer.from_json(tokenizer_json)
    publication = Publication(
        bos_id=files.bos_id,
        eos_ids=files.eos_ids,
        pad_id=tokenizer.pad_id,
        add_bos=files.add_bos,
        chat_template=files.chat_template,
    )
    return config.changed(**changes), parameters, tokenizer, publication


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values on the host, without its history."""
    return tensor.detach().cpu().numpy()
