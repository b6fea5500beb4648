"""Other programs on what Thinker publishes and exports: transformers and llama.cpp, where they are installed."""

# T tokens, V vocabulary

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..checkpoint.publish import Publication, write_view
from ..checkpoint.reader import widen
from ..formats import ModelFiles
from ..formats.gguf_export import check_exportable, export_gguf
from ..formats.huggingface import expressible
from ..formats.tensors import LazyTensors
from ..llm import LLM
from .llamacpp import ask
from .truth import Check, Say, Truth, within

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


def transformers_checks(files: ModelFiles, llm: LLM, tokens: np.ndarray, truth: Truth, say: Say) -> list[Check]:
    """Logits and greedy text of transformers on this folder, or on a view published from it for another format."""
    name = "transformers equals Thinker"
    reason = expressible(files.config)
    if reason is None and importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed"
    if reason is not None:
        return [Check(name, None, None, None, reason)]
    say("transformers")
    prompt, room = beginning(llm, tokens)
    try:
        kind, logits, written = ask_transformers(files, tokens, len(prompt), room)
    except RuntimeError as error:  # its kernels don't take every width that Thinker's take
        return [Check(name, None, None, False, next(iter(str(error).splitlines()), type(error).__name__))]
    same = same_beginning(greedy(llm, prompt, room), written)
    return [
        within(name, logits, truth.logits, truth.tolerance, kind),
        Check("transformers: same greedy continuation", float(same), float(room), same == room, "tokens"),
    ]


def ask_transformers(
    files: ModelFiles, tokens: np.ndarray, beginning: int, room: int
) -> tuple[str, np.ndarray, list[int]]:
    """The class that opens a model, its logits (T, V), and its likeliest continuation of the first tokens."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with contextlib.ExitStack() as stack:
        folder = files.path
        if not folder.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_view(folder, 0, files.config, float_tensors(files), Publication(), None)
        stack.enter_context(quiet_transformers())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        model.generation_config = GenerationConfig()  # greedy, and no end of text ends it
        ids = torch.from_numpy(tokens)[None]
        with torch.inference_mode():
            logits = model(ids).logits[0].numpy()
        written = model.generate(ids[:, :beginning], max_new_tokens=room)[0, beginning:].tolist()
    return type(model).__name__, logits, written


def beginning(llm: LLM, tokens: np.ndarray) -> tuple[list[int], int]:
    """What to continue greedily, and how far."""
    prompt = [int(token) for token in tokens[:8]]
    return prompt, min(GREEDY_TOKENS, llm.config.ctx_len - len(prompt))


def same_beginning(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two texts have in common from the first on."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def gguf_checks(files: ModelFiles, llm: LLM, tokens: np.ndarray, truth: Truth, say: Say) -> list[Check]:
    """llama.cpp on a fresh float32 export of what a model knows of text: tokens, logits, a greedy continuation."""
    files = dataclasses.replace(files, modality=None)
    try:
        check_exportable(files, "f32")
        reason = None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"
    except ValueError as error:  # what GGUF can't carry is no fault of the model
        reason = str(error).removeprefix(f"{files.path}: ")
    if reason is not None:
        return [Check("llama.cpp equals Thinker", None, None, None, reason)]
    say("llama.cpp on a float32 export")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(files, path, "f32")
        return verify_gguf(path, llm, tokens, truth)


def verify_gguf(path: Path, llm: LLM, tokens: np.ndarray, truth: Truth, exact: bool = True) -> list[Check]:
    """llama.cpp on a GGUF file against Thinker on the model it was made from.

    exact: the file is in float32, so logits agree to rounding and the greedy text is the same; otherwise the difference
    of log-probabilities is only reported, as long as it is a number.
    """
    prompt, room = beginning(llm, tokens)
    texts, note = list(AWKWARD_TEXTS), ""
    if json.loads(llm.files.tokenizer_json or "{}").get("normalizer"):
        # To NFC: no other normalizer is exported, and llama.cpp leaves this one to whoever hands it a text.
        texts, note = [unicodedata.normalize("NFC", text) for text in texts], "in NFC: llama.cpp doesn't normalise"
    try:
        answers = ask(path, texts, tokens.tolist(), prompt, room)
    except RuntimeError as error:
        return [Check("llama.cpp reads the file", None, None, False, str(error))]
    pairs = zip(texts, answers.texts, strict=True)
    wrong = [text for text, ids in pairs if ids != llm.tokenizer.encode(text)]
    same_tokens = Check(
        "llama.cpp: same tokens for awkward texts", float(len(wrong)), 0.0, not wrong, repr(wrong[0]) if wrong else note
    )
    theirs = answers.logits.astype(np.float64)
    if exact:
        name = "llama.cpp: float32 logits equal Thinker's"
        logits = within(name, theirs, truth.logits, truth.tolerance, "keys, values float32")
    else:
        name = "llama.cpp: greatest difference in log-probability"
        if np.isfinite(theirs).all():
            difference = float(np.abs(log_softmax(theirs) - log_softmax(truth.logits)).max())
            logits = Check(name, difference, None, None, "rounded weights")
        else:
            logits = Check(name, math.nan, None, False, "not finite in llama.cpp: try bf16 or f32")
    same = same_beginning(greedy(llm, prompt, room), answers.written)
    continuation = Check(
        "llama.cpp: same greedy continuation", float(same), float(room), same == room if exact else None, "tokens"
    )
    return [same_tokens, logits, continuation]


def greedy(llm: LLM, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation in float32, whatever comes: no end of text ends it."""
    from ..decode.torch_decoder import TorchDecoder

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
            return widen(files.tensors[name])

        return read

    return LazyTensors({name: make(name) for name in files.tensors}, str(files.path))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice from transformers inside the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
