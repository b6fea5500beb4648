"""Does a checkpoint compute what it should, wherever it runs? Each answer is a figure beside its tolerance.

`certify` compares ways of computing one model: cached and uncached, batched and alone, ids and embeddings, native and
torch, and, where those packages are installed, transformers and llama.cpp on what Thinker publishes and exports. The
tests prove the code on random weights; this proves one model's files. Showing the result is `commands/doctor.py`'s.
"""

# T tokens, V vocabulary, D d_model

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint.publish import Publication, write_view
from .checkpoint.reader import widen
from .config import ThinkerConfig
from .decode.decoder import Decoder
from .formats import ModelFiles, Q8Tensor
from .formats.gguf_export import export_gguf, exportable
from .formats.huggingface import expressible
from .formats.tensors import LazyTensors
from .llm import LLM

# What float32 promises between two ways of adding the same numbers, as a share of the largest logit.
FLOAT32_SHARE = 1e-5
POSITIONS = 96  # long enough for q and k in a wrong order to show, which takes some twenty tokens
GREEDY_TOKENS = 32

AWKWARD_TEXTS = (
    "Hello, world!",
    "  leading and   inner spaces  ",
    "tabs\tand\nnewlines\r\n\n\n",
    "1234567890 3.14159 1e-5",
    "def f(x):\n    return x ** 2  # code",
    "naïve café Größe 你好 привет",
    "emoji 🙂👩‍👩‍👧 and e\u0301",
    "<|eos|> <|user|> </s> <s> [INST]",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One line of the certificate. `passed` is None for a check that was left out; `note` says why, or where."""

    name: str
    figure: float | None
    tolerance: float | None
    passed: bool | None
    note: str = ""


def within(name: str, ours: np.ndarray, theirs: np.ndarray, share: float = FLOAT32_SHARE, note: str = "") -> Check:
    """The greatest difference of two arrays of logits against `share` of the largest one; 0 asks for the same bytes."""
    difference = float(np.abs(ours.astype(np.float64) - theirs).max())
    tolerance = share * float(np.abs(theirs).max())
    return Check(name, difference, tolerance, bool(difference <= tolerance), note)


def certify(llm: LLM, say: Say) -> list[Check]:
    """Every check of one model, in float32. `say` hears what is under way."""
    files = llm.files
    config = files.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, min(POSITIONS, config.ctx_len - 1))
    checks = [finite_weights(files, say)]
    if checks[0].passed is False:
        return checks
    say("torch, without a cache")
    reference = torch_logits(llm, tokens)  # (T, V)
    from .decode.torch_decoder import TorchDecoder

    checks += decoder_checks("torch", lambda: TorchDecoder(llm.model, 3), llm, tokens, reference, 0, say)
    checks += native_checks(files, llm, tokens, reference, say)
    checks.append(transformers_check(files, tokens, reference, say))
    checks += gguf_checks(files, llm, tokens, reference, say)
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


def torch_logits(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    """The plain uncached forward: logits (T, V)."""
    import torch

    with torch.inference_mode():
        logits = llm.model(torch.from_numpy(tokens)[None].to(llm.model.head.weight.device))
    assert isinstance(logits, torch.Tensor)
    return logits[0].cpu().numpy()


def decoder_checks(
    name: str,
    make: Callable[[], Decoder],
    llm: LLM,
    tokens: np.ndarray,
    reference: np.ndarray,
    exact_slots: int,
    say: Say,
) -> list[Check]:
    """Cached equals uncached, a batch equals each alone, embeddings equal ids; the same bytes if `exact_slots`."""
    share = 0.0 if exact_slots else FLOAT32_SHARE
    say(f"{name}: token by token, in company, and from embeddings")
    decoder = make()
    half = len(tokens) // 2
    whole = decoder.prefill(0, tokens, every=True)
    decoder.truncate(0, 0)
    stepped = [decoder.prefill(0, tokens[:half])[None]]
    stepped += [decoder.step([0], [token]) for token in tokens[half:]]
    cached = np.concatenate(stepped)[:-1] if len(stepped) > 1 else stepped[0]
    alone = []
    for slot in range(decoder.slots):
        decoder.truncate(slot, 0)
        decoder.prefill(slot, tokens[: 3 + 2 * slot])
        alone.append(decoder.step([slot], [tokens[slot]])[0])
        decoder.truncate(slot, 3 + 2 * slot)
    together = decoder.step(range(decoder.slots), tokens[: decoder.slots])
    decoder.truncate(0, 0)
    embedding = llm.model.tok_emb.weight.detach()[tokens.tolist()].float().cpu().numpy()
    embedded = decoder.prefill(0, embeddings=embedding, every=True)
    return [
        within(f"{name}: cached equals uncached", cached, whole[half - 1 : -1], share),
        within(f"{name}: a batch equals each alone", together, np.stack(alone), share),
        within(f"{name}: embeddings equal ids", embedded, whole, share),
        within(f"{name}: decoder equals the plain forward", whole, reference),
    ]


def native_checks(files: ModelFiles, llm: LLM, tokens: np.ndarray, reference: np.ndarray, say: Say) -> list[Check]:
    """The same for the native decoder, to the byte."""
    from .decode.native import NativeUnavailable, open_native

    try:
        return decoder_checks("native", lambda: open_native(files, 3), llm, tokens, reference, 3, say)
    except NativeUnavailable as error:
        return [Check("native equals torch", None, None, None, str(error))]


def transformers_check(files: ModelFiles, tokens: np.ndarray, reference: np.ndarray, say: Say) -> Check:
    """The logits of transformers on this folder, or on a view published from it where it is another format."""
    name = "transformers equals Thinker"
    reason = expressible(files.config)
    if reason is not None:
        return Check(name, None, None, None, reason)
    if importlib.util.find_spec("transformers") is None:
        return Check(name, None, None, None, "transformers is not installed")
    say("transformers")
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.ExitStack() as stack:
        folder = files.path
        if not folder.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_view(folder, 0, files.config, float_tensors(files), Publication(), None)
        stack.enter_context(quiet_transformers())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits = model.eval()(torch.from_numpy(tokens)[None]).logits[0].numpy()
    return within(name, logits, reference, note=type(model).__name__)


def gguf_checks(files: ModelFiles, llm: LLM, tokens: np.ndarray, reference: np.ndarray, say: Say) -> list[Check]:
    """llama.cpp on a fresh float32 export: tokens of awkward texts, log-probabilities, a greedy continuation."""
    name = "llama.cpp equals Thinker"
    reason = exportable(files.config, "f32")
    if reason is None and files.tokenizer_json is None:
        reason = "there is no tokenizer.json to export"
    if reason is None and importlib.util.find_spec("llama_cpp") is None:
        reason = "llama-cpp-python is not installed"
    if reason is not None:
        return [Check(name, None, None, None, reason)]
    say("llama.cpp on a float32 export")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(files, path, "f32")
        return verify_gguf(path, llm, tokens, reference)


def verify_gguf(path: Path, llm: LLM, tokens: np.ndarray, reference: np.ndarray, exact: bool = True) -> list[Check]:
    """llama.cpp on a GGUF file against Thinker on the model it was made from.

    exact: the file is in float32, so logits agree to rounding and the greedy text is the same; otherwise the difference
    of log-probabilities is only reported. llama.cpp keeps keys and values in float32 here, not in its default float16.
    """
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path),
        n_ctx=max(llm.config.ctx_len, 256),  # less it rounds up, and complains
        n_batch=len(tokens),
        n_ubatch=len(tokens),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )
    wrong = [
        text
        for text in AWKWARD_TEXTS
        if llama.tokenize(text.encode(), add_bos=False, special=False) != llm.tokenizer.encode(text)
    ]
    same_tokens = Check(
        "llama.cpp: same tokens for awkward texts", float(len(wrong)), 0.0, not wrong, repr(wrong[0]) if wrong else ""
    )
    llama.eval(tokens.tolist())
    theirs = np.array(llama.scores[: len(tokens)], np.float64)
    if exact:
        logits = within("llama.cpp: float32 logits equal Thinker's", theirs, reference, note="keys, values float32")
    else:
        difference = float(np.abs(log_softmax(theirs) - log_softmax(reference.astype(np.float64))).max())
        logits = Check("llama.cpp: greatest difference in log-probability", difference, None, None, "quantised")
    prompt = [int(token) for token in tokens[:8]]
    llama.reset()
    written: list[int] = []
    room = min(GREEDY_TOKENS, llm.config.ctx_len - len(prompt))
    for token in llama.generate(prompt, temp=0.0):
        written.append(token)
        if len(written) == room:
            break
    ours = greedy(llm, prompt, room)
    same = next((i for i, (a, b) in enumerate(zip(ours, written, strict=True)) if a != b), room)
    llama.close()
    continuation = Check(
        "llama.cpp: same greedy continuation", float(same), float(room), same == room if exact else None, "tokens"
    )
    return [same_tokens, logits, continuation]


def greedy(llm: LLM, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation in float32, whatever comes: no end of text ends it."""
    from .decode.torch_decoder import TorchDecoder

    decoder = TorchDecoder(llm.model)
    logits = decoder.prefill(0, prompt)
    written = [int(logits.argmax())]
    while len(written) < count:
        written.append(int(decoder.step([0], [written[-1]])[0].argmax()))
    return written


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, in the array's own precision."""
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def float_tensors(files: ModelFiles) -> LazyTensors:
    """A model's tensors in float32, each made when it is asked for."""

    def make(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            tensor = files.tensors[name]
            return tensor.to_float32() if isinstance(tensor, Q8Tensor) else widen(tensor)

        return read

    return LazyTensors({name: make(name) for name in files.tensors}, str(files.path))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice from transformers, and no look at its hub, inside the block."""
    from transformers.utils import logging

    before, offline = logging.get_verbosity(), os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]


def describe(config: ThinkerConfig) -> str:
    """One line on what was certified."""
    kind = "mixture of experts" if config.use_moe else "dense"
    return f"{kind}, {config.n_layers} layers, d_model {config.d_model}, {config.parameter_count():,} parameters"
