"""What a new run is made of: its text as batches, what --init gives it, and what will be published beside its weights.

Nothing is decided or trained here: see `start.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..chat import DEFAULT_TEMPLATE, ChatFormat
from ..checkpoint import training
from ..checkpoint.publish import Publication, is_run
from ..config import ThinkerConfig
from ..data.chat_shards import ChatCorpus, prepare_chats
from ..data.mixing import MixedBatches
from ..data.shards import Corpus, prepare
from ..formats import Modality, Q8Tensor, open_model
from ..modality.settings import SensesConfig
from ..places import expand_home
from ..tokenizer import KINDS, Tokenizer
from .chats import Parameters, chat_format, ending_turns, with_turns
from .config import TrainConfig
from .run import Say, TrainingBatches
from .senses import senses_for

# What --init may change of the architecture: nothing that the tensors' shapes or meaning depend on.
FREE_ON_INIT = {"dropout", "ctx_len", "balance_loss"}


@dataclass(frozen=True)
class Ingredients:
    """What a new run is made of: its text, what is published of it, and what --init gives, senses included."""

    config: ThinkerConfig
    corpus: Corpus | ChatCorpus
    publication: Publication
    parameters: Parameters | None
    senses: SensesConfig | None
    taught: Modality | None


def ingredients(config: ThinkerConfig, settings: TrainConfig, given: set[str], say: Say) -> Ingredients:
    """Prepare the text and open what --init names. `given` names the fields that a person set. Raises `ValueError`."""
    parameters: Parameters | None
    if settings.init is None:
        parameters = taught = None
        senses = senses_for(settings.data, settings.senses, None) if settings.chat else None
        corpus = corpus_of(settings, config, wanted_tokenizer(config, settings, given), None, say, senses)
        config = config.changed(vocab_size=corpus.tokenizer.vocab_size)
        publication = own_publication(corpus.tokenizer)
    else:
        if "tokenizer" in given:
            raise ValueError(
                f"{settings.init}: keeps its own tokenizer, and tokenizer {settings.tokenizer} was asked for: "
                "drop the setting, or train from nothing"
            )
        config, parameters, tokenizer, publication, taught = starting_point(settings.init, config, given, say)
        senses = taught.config if taught is not None else None
        if settings.chat:
            senses = senses_for(settings.data, settings.senses, senses)
            config, parameters, tokenizer, publication = with_turns(
                config, parameters, tokenizer, publication, with_media=senses is not None
            )
        corpus = corpus_of(settings, config, tokenizer, publication, say, senses)
    if isinstance(corpus, ChatCorpus):
        publication = ending_turns(publication, corpus.chat_format)
    return Ingredients(config, corpus, publication, parameters, senses, taught)


def wanted_tokenizer(config: ThinkerConfig, settings: TrainConfig, given: set[str]) -> Tokenizer | str:
    """The kind of tokenizer to train, or that of a file. Raises `ValueError` if it is larger than a set vocab_size."""
    if settings.tokenizer in KINDS:
        return settings.tokenizer
    tokenizer = Tokenizer.from_file(expand_home(settings.tokenizer), complete=True)
    if "vocab_size" in given and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{settings.tokenizer}: has {tokenizer.vocab_size:,} tokens with the special ones, "
            f"more than vocab_size {config.vocab_size:,}: raise vocab_size, or name another tokenizer"
        )
    return tokenizer


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
    senses: SensesConfig | None = None,
) -> Corpus | ChatCorpus:
    """The run's text or conversations as tokens. A model that is yet to be made has no publication."""
    if not settings.chat:
        return prepare(settings.data, tokenizer, config.vocab_size, config.ctx_len + 1, say)

    def written_by(tokenizer: Tokenizer) -> ChatFormat:
        return chat_format(tokenizer, publication if publication is not None else own_publication(tokenizer))

    return prepare_chats(
        settings.data, tokenizer, written_by, config.ctx_len, config.vocab_size, say, senses, settings.strict_media
    )


def batches_of(corpus: Corpus | ChatCorpus, settings: TrainConfig, config: ThinkerConfig, say: Say) -> TrainingBatches:
    """What the run's steps take: the corpus's batches, with windows of text between them if there are texts."""
    rows = settings.batch_size * settings.accumulate
    if not settings.text:
        return corpus.batches(rows, config.ctx_len, settings.seed, settings.ramp)
    assert isinstance(corpus, ChatCorpus), "the settings say so"
    chats = corpus.batches(rows - settings.text_rows, config.ctx_len, settings.seed)
    text = prepare(settings.text, corpus.tokenizer, config.vocab_size, chats.length + 1, say)
    return MixedBatches(chats, text.batches(settings.text_rows, chats.length, settings.seed), rows, text.fingerprint)


def starting_point(
    path: str, wanted: ThinkerConfig, given: set[str], say: Say
) -> tuple[ThinkerConfig, Mapping[str, np.ndarray | Q8Tensor], Tokenizer, Publication, Modality | None]:
    """Architecture, parameters, tokenizer, what is published beside them, and the senses, of the model --init names.

    A Thinker run gives the exact, unfolded parameters of what it has published; any other model just that. Raises
    `ValueError` when a flag asks for another architecture than the model has; a longer context is said.
    """
    files = open_model(path)
    parameters: Mapping[str, np.ndarray | Q8Tensor]
    config, parameters, tokenizer_json = files.config, files.tensors, files.tokenizer_json
    exact = training.to_publish(Path(path)) if is_run(Path(path)) else None
    if exact is not None:
        saved = training.load(exact)
        config, parameters, tokenizer_json = saved.config, saved.shown, saved.tokenizer_json
    if tokenizer_json is None:
        raise ValueError(f"{path}: has no tokenizer.json, which --init needs: put the model's own beside its weights")
    fields = given & set(ThinkerConfig.model_fields)
    for name in sorted(fields - FREE_ON_INIT):
        if not satisfies(name, getattr(wanted, name), getattr(config, name)):
            raise ValueError(
                f"{path}: {name} is {getattr(config, name)!r} there and {getattr(wanted, name)!r} was asked for: "
                "drop the setting, or train from nothing"
            )
    changes = {name: getattr(wanted, name) for name in fields & FREE_ON_INIT}
    if (ctx_len := changes.get("ctx_len", 0)) > config.ctx_len:
        say(
            f"ctx_len {ctx_len} is more than the {config.ctx_len} that {path} was trained on: "
            "what lies beyond is new to it, and is learned in this run"
        )
    tokenizer = Tokenizer.from_json(tokenizer_json)
    publication = Publication(
        bos_id=files.bos_id,
        eos_ids=files.eos_ids,
        pad_id=tokenizer.pad_id,
        add_bos=files.add_bos,
        chat_template=files.chat_template,
    )
    return config.changed(**changes), parameters, tokenizer, publication, files.modality


def satisfies(name: str, asked: Any, had: Any) -> bool:
    """Whether a model has what is asked for: `vocab_size` is the most tokens that it may have."""
    return asked >= had if name == "vocab_size" else asked == had
