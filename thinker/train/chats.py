"""What a model needs to be taught conversations: a template, the tokens that it is made of, and where a reply ends.

A model that has a template keeps it. One that has none gets this project's own; tokens that it lacks are appended to
its vocabulary, each beginning as the mean of the others. The data are prepared in `data/chat_shards.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..chat import DEFAULT_TEMPLATE, ROLE_TOKENS, ChatFormat
from ..checkpoint.publish import Publication
from ..config import ThinkerConfig
from ..formats import Q8Tensor
from ..tokenizer import MEDIA, Tokenizer

Parameters = Mapping[str, np.ndarray | Q8Tensor]


def with_turns(
    config: ThinkerConfig,
    parameters: Parameters,
    tokenizer: Tokenizer,
    publication: Publication,
    with_media: bool = False,
) -> tuple[ThinkerConfig, Parameters, Tokenizer, Publication]:
    """A model to be taught conversations, with a template and its tokens, and those of media. `ValueError` if it can't.

    That is so with SentencePiece's kind of vocabulary.
    """
    needed = set(MEDIA) if with_media else set()
    if publication.chat_template is None:
        needed |= ROLE_TOKENS
        publication = dataclasses.replace(publication, chat_template=DEFAULT_TEMPLATE)
    if tokenizer.special_ids.keys() >= needed:
        return config, parameters, tokenizer, publication
    try:
        tokenizer = Tokenizer.from_json(tokenizer.to_json(), complete=True)
    except ValueError as error:
        missing = min(needed - tokenizer.special_ids.keys())
        raise ValueError(f"the model has no {missing}, and can't be given it: {error}") from None
    publication = dataclasses.replace(
        publication,
        bos_id=tokenizer.bos_id if publication.bos_id is None else publication.bos_id,
        pad_id=tokenizer.pad_id if publication.pad_id is None else publication.pad_id,
    )
    if tokenizer.vocab_size > config.vocab_size:  # else the embedding has rows to spare
        grown = {"tok_emb.weight", "head.weight"} & parameters.keys()
        rows = tokenizer.vocab_size
        parameters = dict(parameters) | {name: _grown(parameters[name], rows) for name in grown}
        config = config.changed(vocab_size=rows)
    return config, parameters, tokenizer, publication


def _grown(weight: np.ndarray | Q8Tensor, rows: int) -> np.ndarray:
    wide = np.asarray(weight, np.float32)
    return np.concatenate([wide, np.repeat(wide.mean(axis=0, keepdims=True), rows - len(wide), axis=0)])


def chat_format(tokenizer: Tokenizer, publication: Publication) -> ChatFormat:
    """How this model writes conversations; the same as `llm.LLM` reads from what is published."""
    assert publication.chat_template is not None
    eos_id = publication.eos_ids[0] if publication.eos_ids else None
    return ChatFormat(tokenizer, publication.chat_template, publication.bos_id, eos_id)


def ending_turns(publication: Publication, format: ChatFormat) -> Publication:
    """The token that ends a turn ends a text too, wherever the model runs."""
    if format.end_id is None or format.end_id in publication.eos_ids:
        return publication
    return dataclasses.replace(publication, eos_ids=(*publication.eos_ids, format.end_id))
