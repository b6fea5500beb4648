"""Thinker: a small language model you can read, train on your own text, and run everywhere.

The public names are loaded when they are used: `import thinker` brings in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ThinkerConfig
    from .llm import load
    from .loss import NextTokenLoss
    from .model import ThinkerLM
    from .sampling import Sampling
    from .tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["NextTokenLoss", "Sampling", "ThinkerConfig", "ThinkerLM", "Tokenizer", "load"]

_ROOMS = {
    "NextTokenLoss": "loss",
    "Sampling": "sampling",
    "ThinkerConfig": "config",
    "ThinkerLM": "model",
    "Tokenizer": "tokenizer",
    "load": "llm",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
