"""How well a model predicts a text: loss, perplexity, bits per byte, with a sliding window.

Bits per byte are comparable between any two models, whatever their tokenizers, because both pay for the same bytes:
- every document is predicted whole and once, its first token from bos (or eos, where a tokenizer has only that);
- the end of a document is not predicted: eos stands for no byte;
- past `ctx_len` a window moves on by `stride` tokens and only what is new counts, so that with the default, half the
  context, no token but a document's first ones is predicted from less than that.
What is read and where it is shown is the callers' business: `commands/eval.py`, and training at the end of a run.
"""

# L positions of one window, B windows in a batch, D d_model, V vocabulary

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .decode.decoder import Decoder
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .model import ThinkerLM

Progress = Callable[[int], None]

SORTED_BATCHES = 32  # batches' worth of windows sorted by length together, so that little is padding
ROWS_AT_ONCE = 256  # positions whose logits a decoder gives back at once


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats a token, its exponential, and what a byte of UTF-8 costs in bits."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Window:
    """L + 1 ids: position i is given ids[i] and predicts ids[i + 1], which counts from position `first` on.

    `bytes` is the window's share of its document, for progress.
    """

    ids: np.ndarray
    first: int
    bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return len(self.ids) - 1 - self.first


Score = Callable[[list[Window]], float]


def evaluate(
    model: ThinkerLM | Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[str | Iterable[str]],
    stride: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    start_id: int | None = None,
) -> Evaluation:
    """Predict every byte of the documents once. A document is a text, or its pieces, cut where no token is cut.

    model: a `ThinkerLM`, as it is on its device, or a `Decoder`, whose slot 0 is used. start_id replaces the bos that
    each document begins with. progress is called with the number of bytes done since the last call. Raises `ValueError`
    when there is no text, the stride doesn't fit, or nothing to begin with.
    """
    ctx_len = model.config.ctx_len
    stride = max(ctx_len // 2, 1) if stride is None else stride
    if not 1 <= stride <= ctx_len:
        raise ValueError(f"stride is {stride}: choose 1 to {ctx_len}, the model's ctx_len")
    start = next((id for id in (start_id, tokenizer.bos_id, tokenizer.eos_id) if id is not None), None)
    if start is None:
        raise ValueError("the tokenizer has neither bos nor eos, so a document's first token can't be predicted")
    score = _decoder_score(model) if isinstance(model, Decoder) else _torch_score(model)
    began = time.perf_counter()
    nats, tokens, size = 0.0, 0, 0
    stream = (window for document in documents for window in _windows(document, tokenizer, start, ctx_len, stride))
    while pool := list(itertools.islice(stream, batch * SORTED_BATCHES)):
        pool.sort(key=lambda window: len(window.ids))
        for at in range(0, len(pool), batch):
            windows = pool[at : at + batch]
            nats += score(windows)
            tokens += sum(window.tokens for window in windows)
            done = sum(window.bytes for window in windows)
            size += done
            if progress is not None:
                progress(done)
    if tokens == 0:
        raise ValueError("there is no text to evaluate: all documents are empty")
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=nats / math.log(2) / size,
        tokens=tokens,
        bytes=size,
        seconds=time.perf_counter() - began,
    )


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where a diverged model's is beyond what a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)


def _windows(
    document: str | Iterable[str], tokenizer: Tokenizer, start: int, ctx_len: int, stride: int
) -> Iterator[Window]:
    """The windows of one document; the last one ends with it and reaches back as far as the context allows.

    With n = 10 tokens, ctx_len 4 and stride 2 positions 0-3, 2-5, 4-7 and 6-9, of which all, 4-5, 6-7 and 8-9 count.
    """
    size = 0
    parts = [np.array([start], np.int64)]
    for piece in [document] if isinstance(document, str) else document:
        size += len(piece.encode())
        parts.append(tokenizer.encode_batch([piece])[0].astype(np.int64))
    ids = np.concatenate(parts)
    total = len(ids) - 1  # positions, each with a token to predict
    counted = 0
    while counted < total:
        end = min(counted + (stride if counted else ctx_len), total)
        begin = max(end - ctx_len, 0)
        # Rounded so that the shares add up.
        share = size * end // total - size * counted // total
        yield Window(ids[begin : end + 1], counted - begin, share)
        counted = end


def _torch_score(model: ThinkerLM) -> Score:
    import torch
    from torch import Tensor

    from .loss import cross_entropy_sum

    device = model.head.weight.device

    @torch.inference_mode()
    def score(windows: list[Window]) -> float:
        length = max(len(window.ids) for window in windows) - 1
        tokens = torch.zeros((len(windows), length), dtype=torch.long)  # padded on the right: nobody looks there
        targets = torch.zeros_like(tokens)
        counted = torch.zeros_like(tokens, dtype=torch.bool)
        for row, window in enumerate(windows):
            end = len(window.ids) - 1
            ids = torch.from_numpy(window.ids)
            tokens[row, :end], targets[row, :end] = ids[:-1], ids[1:]
            counted[row, window.first : end] = True
        training = model.training
        model.eval()
        try:
            # In the parameters' own precision, even where training computes in a lower one.
            with torch.autocast(device.type, enabled=False):
                hidden = model.features(tokens.to(device))
                assert isinstance(hidden, Tensor)
                rows = hidden[counted.to(device)]  # (tokens that count, D): the head is not run for the others
                return float(cross_entropy_sum(rows, model.head.weight, targets[counted].to(device)))
        finally:
            model.train(training)

    return score


def _decoder_score(decoder: Decoder) -> Score:
    def score(windows: list[Window]) -> float:
        return sum(float(token_losses(decoder, window.ids, window.first)[0].sum()) for window in windows)

    return score


def token_losses(decoder: Decoder, ids: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats that ids[first + 1:] cost, each given all before it, and whether each was the likeliest: two (T,) arrays.

    Slot 0 is used, and empty afterwards. Raises `ValueError` beyond `ctx_len`.
    """
    decoder.truncate(0, 0)
    if first:
        decoder.prefill(0, ids[:first])
    losses, likeliest = np.empty(len(ids) - 1 - first), np.empty(len(ids) - 1 - first, bool)
    for begin in range(first, len(ids) - 1, ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(ids) - 1)
        logits = decoder.prefill(0, ids[begin:end], every=True).astype(np.float64)  # (rows, V)
        wanted = ids[begin + 1 : end + 1]
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses[begin - first : end - first] = log_sum - logits[np.arange(end - begin), wanted]
        likeliest[begin - first : end - first] = logits.argmax(axis=1) == wanted
    decoder.truncate(0, 0)
    return losses, likeliest
