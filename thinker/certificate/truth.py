"""What a model answers, found in float64, and how far from it a figure may be."""

# T tokens, V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..llm import LLM

# What float32 promises between two ways of adding the same numbers, as a share of the largest logit.
FLOAT32_SHARE = 1e-5
# Where a model magnifies roundings more than that, no float32 is better: there an implementation may be so many times
# as far from float64 as torch's float32 is (as torch tests its own compiler, `same` in torch/_dynamo/utils.py).
AS_GOOD_AS_TORCH = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One line of the certificate. `passed` is None for a check that was left out; `note` says why, or where."""

    name: str
    figure: float | None
    tolerance: float | None
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class Truth:
    """What a model answers to some tokens: the plain forward in float64, and torch's in float32 beside it, (T, V)."""

    logits: np.ndarray
    by_torch: np.ndarray

    @property
    def float32(self) -> float:
        """How far from the truth float32 should be."""
        return FLOAT32_SHARE * float(np.abs(self.logits).max())

    @property
    def tolerance(self) -> float:
        """How far from it an implementation may be."""
        return max(self.float32, AS_GOOD_AS_TORCH * apart(self.by_torch, self.logits))


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The greatest difference of two arrays of logits."""
    return float(np.abs(ours.astype(np.float64) - theirs).max())


def within(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float, note: str = "") -> Check:
    """The greatest difference of two arrays of logits against what is tolerated; 0 asks for the same bytes."""
    difference = apart(ours, theirs)
    return Check(name, difference, tolerance, bool(difference <= tolerance), note)


def find_truth(llm: LLM, tokens: np.ndarray) -> Truth:
    """The plain uncached forward of T tokens, twice. Weights are widened part by part, only while a part computes."""
    import torch
    from torch import nn

    model = llm.model
    ids = torch.from_numpy(tokens)[None].to(model.head.weight.device)

    def widened(part: nn.Module, arguments: object) -> None:
        part.double()

    def narrowed(part: nn.Module, arguments: object, output: object) -> None:
        part.float()

    def logits() -> np.ndarray:
        answer = model(ids)
        assert isinstance(answer, torch.Tensor)
        return answer[0].cpu().numpy()

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        by_torch = logits()
        for part in (model.tok_emb, *model.blocks, model.norm, model.head):
            hooks.callback(part.register_forward_pre_hook(widened).remove)
            hooks.callback(part.register_forward_hook(narrowed).remove)
        return Truth(logits(), by_torch)
