"""Thinker's own decoders against the plain forward and against themselves: cached, batched, from embeddings."""

# T tokens, D d_model

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode.decoder import Decoder
from ..formats import ModelFiles
from ..llm import LLM
from ..sampling import Draws, Sampling
from .truth import Check, Say, Truth, within

WRITTEN = 96  # tokens, enough for a native decoder to begin with drafts


def decoder_checks(
    name: str,
    make: Callable[[], Decoder],
    llm: LLM,
    tokens: np.ndarray,
    truth: Truth,
    same_bytes: bool,
    say: Say,
) -> list[Check]:
    """Cached equals uncached, a batch equals each alone, embeddings equal ids, a text its tokens drawn one by one: to
    rounding, or to the byte."""
    tolerance = np.zeros(len(tokens)) if same_bytes else truth.tolerance
    say(f"{name}: token by token, in company, and from embeddings")
    decoder = make()
    half = len(tokens) // 2
    whole = decoder.prefill(0, tokens, every=True)
    decoder.truncate(0, 0)
    stepped = [decoder.prefill(0, tokens[:half])[None]]
    stepped += [decoder.step([0], [token]) for token in tokens[half:]]
    cached = np.concatenate(stepped)[:-1] if len(stepped) > 1 else stepped[0]
    alone = []
    lengths = [min(3 + 2 * slot, len(tokens) - 1) for slot in range(decoder.slots)]
    for slot, length in enumerate(lengths):
        decoder.truncate(slot, 0)
        decoder.prefill(slot, tokens[:length])
        alone.append(decoder.step([slot], [tokens[length]])[0])
        decoder.truncate(slot, length)
    together = decoder.step(range(decoder.slots), tokens[lengths])
    decoder.truncate(0, 0)
    embedding = llm.model.tok_emb.weight.detach()[tokens.tolist()].float().cpu().numpy()
    embedded = decoder.prefill(0, embeddings=embedding, every=True)
    return [
        within(f"{name}: cached equals uncached", cached, whole[half - 1 : -1], tolerance[half - 1 : -1]),
        within(f"{name}: a batch equals each alone", together, np.stack(alone), tolerance[lengths]),
        within(f"{name}: embeddings equal ids", embedded, whole, tolerance),
        written(f"{name}: a text equals its tokens alone", decoder, tokens[:1].tolist()),
        within(f"{name}: decoder equals torch in float64", whole, truth.logits, truth.tolerance),
    ]


def written(name: str, decoder: Decoder, first: list[int]) -> Check:
    """How many tokens of a text, drawn in one call, differ from those drawn with a call each."""
    count, texts = min(WRITTEN, decoder.config.ctx_len - 1), []
    try:
        for at_once in (count, 1):
            decoder.truncate(0, 0)
            draws, text = Draws(decoder.slots, decoder.config.vocab_size), [*first]
            draws.begin(0, Sampling(temperature=0.5))
            while len(text) <= count:
                text += decoder.run([0], text[-1:], draws, at_once)[0].tolist()
            texts.append(text)
    except ValueError:  # no finite logit
        return Check(name, None, 0.0, False, "nothing can be drawn")
    differing = sum(a != b for a, b in zip(*texts, strict=True))
    return Check(name, float(differing), 0.0, not differing, f"of {count} tokens")


def torch_checks(llm: LLM, tokens: np.ndarray, truth: Truth, say: Say) -> list[Check]:
    """The torch decoder, to rounding."""
    from ..decode.torch_decoder import TorchDecoder

    return decoder_checks("torch", lambda: TorchDecoder(llm.model, 3), llm, tokens, truth, False, say)


def native_checks(files: ModelFiles, llm: LLM, tokens: np.ndarray, truth: Truth, say: Say) -> list[Check]:
    """The same for the native decoder, to the byte."""
    from ..decode.native import NativeUnavailable, open_native

    try:
        return decoder_checks("native", lambda: open_native(files, 3), llm, tokens, truth, True, say)
    except NativeUnavailable as error:
        return [Check("native equals torch", None, None, None, str(error))]
