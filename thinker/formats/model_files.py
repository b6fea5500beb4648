"""What opening a model gives, whoever wrote it. No file is read in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import ThinkerConfig
from .tensors import Array


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, described and ready to be read.

    `tensors` has Thinker's names and makes each tensor when it is asked for, in any float type, or as `Q8Tensor` where
    the file has Q8_0; NaN and infinity raise `ValueError` then. `dtype` names the type that most weights have there.
    """

    config: ThinkerConfig
    tensors: Mapping[str, Array]
    path: Path
    dtype: str
    tokenizer_json: str | None = None
    chat_template: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    add_bos: bool = False
    step: int | None = None
