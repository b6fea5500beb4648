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
# A trained model magnifies roundings at some tokens, where no float32 keeps that promise: in SmolLM2 one of 96 moves
# by 1e-3 when nothing but the norms gets more exact. How much a token magnifies is measured, not taken from anybody's
# float32: the exact answer is found again with the stream rounded once between blocks, in other directions each time.
ROUNDING = 2.0**-24
TRIES = 4
# So many times a value is rounded on its way through a block: norms, products, RoPE, softmax, gate, sums of hundreds.
ROUNDINGS_IN_A_BLOCK = 32

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
    """What a model answers to T tokens: in float64, by torch in float32, both (T, V), and how much each sways (T,).

    `sway` is how far a token's logits move when the stream is rounded once between blocks.
    """

    logits: np.ndarray
    by_torch: np.ndarray
    sway: np.ndarray

    @property
    def share(self) -> float:
        """How far from the truth float32 should be."""
        return FLOAT32_SHARE * float(np.abs(self.logits).max())

    @property
    def tolerance(self) -> np.ndarray:
        """How far from it an implementation may be at each token, (T,)."""
        return np.maximum(self.share, ROUNDINGS_IN_A_BLOCK * self.sway)


def apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The greatest difference of two arrays of logits at each token: (T, V) to (T,). Infinities differ by NaN."""
    with np.errstate(invalid="ignore"):
        return np.abs(ours.astype(np.float64) - theirs).max(axis=-1)


def within(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float | np.ndarray, note: str = "") -> Check:
    """The difference of two arrays of logits, at the token that comes nearest to what is tolerated, or exceeds it most.

    A tolerance of 0 asks for the same bytes; NaN is never tolerated.
    """
    figures = apart(ours, theirs)
    tolerances = np.broadcast_to(tolerance, figures.shape)
    worst = int(np.argmax(figures - tolerances))  # NaN counts as the largest
    figure, limit = float(figures[worst]), float(tolerances[worst])
    return Check(name, figure, limit, figure <= limit, note)


def swaying(truth: Truth) -> Check:
    """How many tokens are allowed more than float32's share, and how much: a figure to know, neither pass nor fail."""
    beyond = truth.tolerance > truth.share
    note = f"of {len(beyond)}" + (f"; up to {truth.tolerance.max():.2e} allowed" if beyond.any() else "")
    return Check("float64: tokens that magnify roundings", float(beyond.sum()), None, None, note)


def find_truth(llm: LLM, tokens: np.ndarray) -> Truth:
    """The plain uncached forward of T tokens. Weights are widened part by part, only while a part computes."""
    import torch
    from torch import Tensor, nn

    model = llm.model
    ids = torch.from_numpy(tokens)[None].to(model.head.weight.device)
    draws = torch.Generator().manual_seed(0)

    def widened(part: nn.Module, arguments: object) -> None:
        part.double()

    def narrowed(part: nn.Module, arguments: object, output: object) -> None:
        part.float()

    def rounded(part: nn.Module, arguments: object, output: Tensor | tuple[Tensor, object]) -> object:
        stream = output if isinstance(output, Tensor) else output[0]
        noise = torch.rand(stream.shape, generator=draws, dtype=torch.float64).to(stream.device)
        stream = stream * (1 + ROUNDING * (2 * noise - 1))
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    def logits() -> np.ndarray:
        answer = model(ids)
        assert isinstance(answer, torch.Tensor)
        return answer[0].cpu().numpy()

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        by_torch = logits()
        for part in (model.tok_emb, *model.blocks, model.norm, model.head):
            hooks.callback(part.register_forward_pre_hook(widened).remove)
            hooks.callback(part.register_forward_hook(narrowed).remove)
        exact = logits()
        for part in (model.tok_emb, *model.blocks):
            hooks.callback(part.register_forward_hook(rounded).remove)
        sway = np.max([apart(logits(), exact) for _ in range(TRIES)], axis=0)
    return Truth(exact, by_torch, sway)
