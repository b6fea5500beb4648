"""Does a checkpoint compute what it should, wherever it runs? Each answer is a figure beside its tolerance.

`certify` compares ways of computing one model: cached and uncached, batched and alone, ids and embeddings, native and
torch (`decoders.py`), and, where those packages are installed, transformers and llama.cpp on what Thinker publishes and
exports (`elsewhere.py`); the judge is `truth.py`'s. The tests prove the code on random weights; this proves one model's
files. Showing the result is `commands/doctor.py`'s.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..config import ThinkerConfig
from ..formats import ModelFiles
from ..llm import LLM, Notice, load
from .decoders import native_checks, torch_checks
from .elsewhere import gguf_checks, transformers_checks, verify_gguf
from .truth import Check, Say, Truth, find_truth, swaying, within

__all__ = ["Check", "Truth", "certify", "describe", "find_truth", "load_short", "some_tokens", "verify_gguf", "within"]

POSITIONS = 96  # long enough for q and k in a wrong order to show, which takes some twenty tokens
CONTEXT = 256  # more than is asked here: keys and values for a model's own ctx_len, several times, may fill the memory
SHORTEST = 3  # one token to begin with, one to go on with, and one that is written


def load_short(path: str, notice: Notice) -> tuple[ModelFiles, LLM]:
    """A model's files, and the model in torch and float32, with a context no longer than the checks need."""
    llm = load(path, "torch", "float32", notice=notice)
    files = llm.files
    llm.files = dataclasses.replace(files, config=files.config.changed(ctx_len=min(files.config.ctx_len, CONTEXT)))
    return files, llm


def some_tokens(config: ThinkerConfig) -> np.ndarray:
    """What a model is asked about: random ids, always the same. Raises `ValueError` where there is no room for two."""
    if config.ctx_len < SHORTEST:
        raise ValueError(f"ctx_len {config.ctx_len} is too short to certify: {SHORTEST} is the least")
    return np.random.default_rng(0).integers(0, config.vocab_size, min(POSITIONS, config.ctx_len - 1))


def certify(llm: LLM, say: Say) -> list[Check]:
    """Every check of one model, in float32. `say` hears what is under way."""
    files = llm.files
    tokens = some_tokens(files.config)
    checks = [finite_weights(files, say)]
    if checks[0].passed is False:
        return checks
    say("torch, without a cache, in float32 and float64")
    truth = find_truth(llm, tokens)
    checks.append(swaying(truth))
    checks.append(within("torch: float32 equals float64", truth.by_torch, truth.logits, truth.tolerance))
    checks += torch_checks(llm, tokens, truth, say)
    checks += native_checks(files, llm, tokens, truth, say)
    checks += transformers_checks(files, llm, tokens, truth, say)
    checks += gguf_checks(files, llm, tokens, truth, say)
    return checks


def finite_weights(files: ModelFiles, say: Say) -> Check:
    """Whether every tensor can be read and has no NaN, and how many parameters there are."""
    say("reading every tensor")
    count = 0
    try:
        for name in files.tensors:
            count += int(np.prod(files.tensors[name].shape))
    except ValueError as error:
        return Check("weights are whole and finite", None, None, False, str(error))
    expected = files.config.parameter_count()
    return Check("weights are whole and finite", float(count), float(expected), count == expected, "parameters")


def describe(config: ThinkerConfig) -> str:
    """One line on what was certified."""
    kind = "mixture of experts" if config.use_moe else "dense"
    return f"{kind}, {config.n_layers} layers, d_model {config.d_model}, {config.parameter_count():,} parameters"
