"""The unified sequence: every picture and sound in its place in the stream, exactly.

A conversation's ids have one placeholder, `<|image|>` or `<|audio|>`, for each picture or sound, between its begin and
end tokens. `expand` repeats each as often as its encoder gives positions; `splice` puts the features there. Positions,
causality and the cache are the model's: to it they are embeddings as any other. Works on numpy and torch arrays alike.
"""

# T tokens, D d_model, N positions of all media

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..tokenizer import MEDIA, Tokenizer
from .settings import KINDS, Kind

Array = TypeVar("Array", bound=Any)

PLACEHOLDERS: dict[Kind, str] = {"image": "<|image|>", "audio": "<|audio|>"}
NAMES: dict[Kind, str] = {"image": "pictures", "audio": "sounds"}


@dataclass(frozen=True)
class Expanded:
    """Ids with as many placeholders as there are positions; where those of medium number i stand, `media` is i + 1."""

    ids: np.ndarray  # (T,) int64
    media: np.ndarray  # (T,) int32, 0 where text stands
    source: np.ndarray  # (T,) int64, the place of each id before


def placeholder_ids(tokenizer: Tokenizer) -> dict[Kind, int]:
    """The ids of the placeholders. Raises `ValueError` for a tokenizer without all tokens of pictures and sound."""
    missing = [name for name in MEDIA if name not in tokenizer.special_ids]
    if missing:
        raise ValueError(f"the tokenizer has no {missing[0]}: pictures and sounds have no place in its texts")
    return {kind: tokenizer.special_ids[name] for kind, name in PLACEHOLDERS.items()}


def expand(ids: Sequence[int], given: Sequence[tuple[Kind, int]], placeholders: Mapping[Kind, int]) -> Expanded:
    """Repeat the placeholders in `ids` for the media given in order, each as its kind and count of positions.

    Ids [9, 5, 7] with placeholder 5 and [("image", 3)] give ids [9, 5, 5, 5, 7] and media [0, 1, 1, 1, 0]. Raises
    `ValueError` with both numbers when there are more or fewer media of a kind than placeholders, or in another order.
    """
    kind_of = {id: kind for kind, id in placeholders.items()}
    flat = np.asarray(ids, np.int64)
    places = np.flatnonzero(np.isin(flat, list(kind_of)))
    wanted = [kind_of[int(flat[place])] for place in places]
    for kind in KINDS:
        have, need = sum(one == kind for one, _ in given), wanted.count(kind)
        if have != need:
            raise ValueError(f"{have} {NAMES[kind]} for {need} placeholders {PLACEHOLDERS[kind]}: give one each")
    for number, ((kind, count), needed) in enumerate(zip(given, wanted, strict=True), start=1):
        if kind != needed:
            raise ValueError(f"medium {number} is {kind}, and the placeholder there is for {needed}: change the order")
        if count < 1:
            raise ValueError(f"medium {number} has {count} positions, at least 1 is needed")
    repeats = np.ones(len(flat), np.int64)
    repeats[places] = [count for _, count in given]
    numbers = np.zeros(len(flat), np.int32)
    numbers[places] = np.arange(1, len(given) + 1)
    return Expanded(
        ids=flat.repeat(repeats), media=numbers.repeat(repeats), source=np.arange(len(flat)).repeat(repeats)
    )


def splice(embeddings: Array, where: Array, features: Array) -> Array:
    """Embeddings (…, T, D) with the features (N, D), in order, at the N true places of `where` (…, T), as a new array.

    Raises `ValueError` with both numbers when they are not as many, or not as wide.
    """
    places = int(where.sum())
    if places != len(features):
        raise ValueError(f"{len(features)} features for {places} placeholders: they must be as many")
    if features.shape[-1] != embeddings.shape[-1]:
        raise ValueError(f"features are {features.shape[-1]} wide, the stream is {embeddings.shape[-1]}")
    spliced = embeddings.copy() if isinstance(embeddings, np.ndarray) else embeddings.clone()
    spliced[where] = features
    return spliced
