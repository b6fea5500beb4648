"""llama.cpp through llama-cpp-python's binding of its C functions; its own greedy sampler, no Python per layer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import llama_cpp
import numpy as np

from . import Ready, timed

KEY_VALUE_TYPES = {"float16": 1, "float32": 0}  # ggml's numbers; float16 is what llama.cpp does by itself


def decode(model: str, threads: int, prompt: int = 16, new: int = 256, keys_and_values: str = "float16") -> Ready:
    """One prompt and `new` greedy tokens after it; everything counts."""
    context, about = _open(model, threads, prompt + new, keys_and_values)
    tokens = _some_tokens(context, prompt)
    memory, sampler = llama_cpp.llama_get_memory(context), llama_cpp.llama_sampler_init_greedy()
    one = (llama_cpp.llama_token * 1)()

    def turn() -> float:
        llama_cpp.llama_memory_clear(memory, True)
        start = time.perf_counter()
        _feed(context, tokens, prompt)
        for left in range(new, 0, -1):
            one[0] = llama_cpp.llama_sampler_sample(sampler, context, -1)
            if left > 1:
                _feed(context, one, 1)
        return time.perf_counter() - start

    return Ready(turn, new, about)


def prefill(model: str, threads: int, length: int = 500, keys_and_values: str = "float16") -> Ready:
    """A prompt of `length` tokens, with logits for the last one."""
    context, about = _open(model, threads, length + 1, keys_and_values)
    tokens, memory = _some_tokens(context, length), llama_cpp.llama_get_memory(context)

    def whole() -> None:
        _feed(context, tokens, length)
        llama_cpp.llama_get_logits_ith(context, -1)  # waits until they are there

    def turn() -> float:
        llama_cpp.llama_memory_clear(memory, True)
        return timed(whole)

    return Ready(turn, length, about)


def _open(model: str, threads: int, length: int, keys_and_values: str) -> tuple[int, dict[str, object]]:
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if loaded is None:
        raise ValueError(f"llama.cpp can't open {model}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = -(-length // 256) * 256
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = KEY_VALUE_TYPES[keys_and_values]
    context = llama_cpp.llama_init_from_model(loaded, params)
    if context is None:
        raise ValueError(f"llama.cpp refuses a context of {length} tokens with {keys_and_values} keys and values")
    system = llama_cpp.llama_print_system_info().decode()
    about = {
        "llama-cpp-python": llama_cpp.__version__,
        "threads": threads,
        "keys and values": keys_and_values,
        "compiled for": ", ".join(part.split(" = ")[0].strip() for part in system.split("|") if part.endswith("= 1 ")),
    }
    return context, about


def _some_tokens(context: int, count: int) -> ctypes.Array[ctypes.c_int32]:
    vocabulary = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    ids = np.random.default_rng(1).integers(0, llama_cpp.llama_vocab_n_tokens(vocabulary), count)
    tokens: ctypes.Array[ctypes.c_int32] = (llama_cpp.llama_token * count)(*ids.tolist())
    return tokens


def _feed(context: int, tokens: ctypes.Array[ctypes.c_int32], count: int) -> None:
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count))
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


_SILENT: Callable[..., None] = llama_cpp.llama_log_callback(lambda level, text, data: None)
