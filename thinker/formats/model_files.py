"""What opening a model gives, whoever wrote it. No file is read in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import ThinkerConfig
from .tensors import Array

if TYPE_CHECKING:  # a text-only model needs nothing of it
    from ..modality.settings import SensesConfig


@dataclass(frozen=True)
class Modality:
    """Encoders and projectors on disk: how they are built, and their tensors by Thinker's names."""

    config: SensesConfig
    tensors: Mapping[str, np.ndarray]


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
    modality: Modality | None = None
