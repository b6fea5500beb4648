"""The settings of GGUF's four architectures, both ways: metadata to `ThinkerConfig`, strictly, and back.

llama.cpp has many settings and gets more, so whatever isn't known to change nothing is refused by name: better no model
than a wrong one. Names of tensors are in `gguf.py`, the vocabulary in `gguf_tokenizer.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter
from pydantic import ValidationError

from ..checkpoint.files import brief
from ..checkpoint.reader import all_finite, widen
from ..config import RopeScaling, ThinkerConfig
from ..rope import inverse_frequencies
from .gguf_file import GGUFFile
from .huggingface_config import LONGEST, MOST_HEADS
from .q8 import Q8Tensor
from .tensors import Array

ROPE_FACTORS = "rope_freqs.weight"
OWN_SCALING = "thinker.rope_scaling"  # the settings behind the factors as JSON, which nobody else reads


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's networks, as far as Thinker's can be it."""

    name: str
    use_swiglu: bool = True
    use_qk_norm: bool = False
    needs_moe: bool = False
    may_moe: bool = False
    neighbours: bool = False  # RoPE turns dimensions 2i and 2i + 1, and takes factors of frequencies from a tensor


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("llama", may_moe=True, neighbours=True),
        Architecture("arcee", use_swiglu=False, neighbours=True),
        Architecture("qwen3", use_qk_norm=True),
        Architecture("qwen3moe", use_qk_norm=True, needs_moe=True, may_moe=True),
    )
}


def read_config(file: GGUFFile) -> tuple[ThinkerConfig, Architecture]:
    """The network that a file describes, rope scaling aside. What Thinker can't compute raises `ValueError` by name."""
    arch = ARCHITECTURES.get(str(file.scalar("general.architecture")))
    if arch is None:
        found = brief(file.scalar("general.architecture"))
        raise file.fail(f"architecture '{found}' is not supported; Thinker opens {', '.join(ARCHITECTURES)}")
    name = arch.name
    if (kind := file.scalar("general.type")) not in (None, "model"):
        raise file.fail(f"is a '{brief(kind)}', not a model")
    if (parts := file.scalar("split.count")) not in (None, 0, 1):
        raise file.fail(f"is one of {parts} parts; join them with llama-gguf-split --merge")
    settings: dict[str, Any] = {
        key[len(name) + 1 :]: value for key, value in file.fields.items() if key.startswith(f"{name}.")
    }

    def integer(key: str, default: int | None = None) -> int:
        value = settings.pop(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(set(value.tolist())) == 1:
            value = int(value[0])  # one value for each layer, and all the same
        if type(value) is not int:
            shown = "nothing" if value is None else brief(value)
            raise file.fail(f"{name}.{key} must be a whole number, found {shown}")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = settings.pop(key, default)
        if type(value) not in (int, float):
            raise file.fail(f"{name}.{key} must be a number, found {brief(value)}")
        # The file has float32: the shortest number that rounds to it is what was meant, 1e-6 for example.
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))

    heads, width = integer("attention.head_count"), integer("embedding_length")
    kv_heads = integer("attention.head_count_kv", heads)
    if not 1 <= heads <= MOST_HEADS or width < 1:
        raise file.fail(f"{heads} heads over a width of {width} are impossible")
    head_dim = integer("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := integer(key, head_dim)) != head_dim:
            raise file.fail(f"{name}.{key} {value} differs from the heads' width {head_dim}, which is not supported")
    embedding = file.entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.fail("has no token_embd.weight")
    vocab_size = embedding.shape[0]
    if integer("vocab_size", vocab_size) != vocab_size:
        raise file.fail(f"{name}.vocab_size is not the {vocab_size} rows of token_embd.weight")
    n_layers, hidden = integer("block_count"), integer("feed_forward_length", 0)
    if n_layers > len(file.entries):
        raise file.fail(f"{name}.block_count is {n_layers}, and there are only {len(file.entries)} tensors")
    n_experts, used = integer("expert_count", 0), integer("expert_used_count", 0)
    use_moe = n_experts > 0
    if (arch.needs_moe and not use_moe) or (use_moe and not arch.may_moe):
        raise file.fail(f"{name}.expert_count {n_experts} is not supported")
    hidden = integer("expert_feed_forward_length", hidden) if use_moe else hidden
    ctx_len = integer("context_length")
    if ctx_len > LONGEST:
        raise file.fail(f"{name}.context_length {ctx_len} is beyond {LONGEST}")
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_layers": n_layers,
        "d_model": width,
        "n_heads": heads,
        "d_ff": hidden,
        "ctx_len": ctx_len,
        "dropout": 0.0,
        "rope_theta": number("rope.freq_base", 10000.0),
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "use_swiglu": arch.use_swiglu,
        "activation": None if arch.use_swiglu else "relu2",
        "use_qk_norm": arch.use_qk_norm,
        "use_moe": use_moe,
        "tie_embeddings": "output.weight" not in file.entries,
        "head_dim": None if head_dim * heads == width else head_dim,
    }
    if kv_heads != heads:
        values |= {"use_gqa": True, "kv_groups": kv_heads}
    if use_moe:
        values |= {"num_experts": n_experts, "num_experts_per_tok": used}
    _refuse_unsupported(settings, ctx_len, name, file)
    return ThinkerConfig.from_mapping(values, str(file.path)), arch


# Further keys of an architecture, each with the values that change nothing.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "attention.causal": lambda value: value is True,
    "attention.scale": lambda value: value == 0,
    "pooling_type": lambda value: value == 0,
    "expert_shared_count": lambda value: value == 0,
    "expert_weights_norm": lambda value: value is True,
    "expert_weights_scale": lambda value: value in (0, 1),
    "expert_gating_func": lambda value: value in (0, 1),
    "leading_dense_block_count": lambda value: value == 0,
    "rope.scale_linear": lambda value: value in (0, 1),
    "rope.scaling.type": lambda value: value in ("none", "linear"),
    "rope.scaling.factor": lambda value: value in (0, 1),
    "rope.scaling.attn_factor": lambda value: value in (0, 1),
    "rope.scaling.original_context_length": lambda value: True,
    "rope.scaling.finetuned": lambda value: True,
}


def _refuse_unsupported(settings: dict[str, Any], ctx_len: int, name: str, file: GGUFFile) -> None:
    """Whatever is left must be known to change nothing: llama.cpp's settings are many, and grow."""
    window = settings.pop("attention.sliding_window", None)
    if type(window) is int and 0 < window < ctx_len:
        raise file.fail(f"{name}.attention.sliding_window {window} is not supported: Thinker attends to everything")
    if settings.get("rope.scaling.type") == "none":
        settings.pop("rope.scaling.factor", None)
    for key, value in settings.items():
        if isinstance(value, list | np.ndarray) or key not in _NEUTRAL or not _NEUTRAL[key](value):
            raise file.fail(f"{name}.{brief(key)} {brief(value)} is not supported")


def recognise_scaling(factors: Array, config: ThinkerConfig, file: GGUFFile) -> RopeScaling | None:
    """The settings of Llama 3's rope scaling behind the factors that a file carries instead of them."""
    half = config.head_width // 2
    if isinstance(factors, Q8Tensor) or factors.shape != (half,) or not all_finite(factors) or factors.min() < 1:
        raise file.fail(f"{ROPE_FACTORS} must hold {half} numbers from 1 on")
    wide = widen(factors)
    if np.all(wide == 1):
        return None
    for scaling in (*_own_scaling(file), *_guesses(wide, config)):
        with np.errstate(all="ignore"):  # what a file claims may be any number
            found = rope_factors(config.changed(rope_scaling=scaling))
        # Some float32 roundings of 6e-8 each, in another order than the program that wrote them.
        if np.allclose(wide, found, rtol=1e-5):
            return scaling
    raise file.fail(
        f"{ROPE_FACTORS} can't be traced back to settings of Llama 3's rope scaling, which alone is supported: "
        "open the model that this file was made from"
    )


def _own_scaling(file: GGUFFile) -> Iterator[RopeScaling]:
    """The settings that a file of Thinker's says it was made with."""
    with contextlib.suppress(ValidationError):
        scaling = RopeScaling.model_validate_json(str(file.scalar(OWN_SCALING)))
        if scaling.original_ctx_len <= LONGEST:
            yield scaling


def _guesses(factors: np.ndarray, config: ThinkerConfig) -> Iterator[RopeScaling]:
    """What settings may be behind the factors."""
    for original, high in _candidates(factors.astype(np.float64), inverse_frequencies(config).astype(np.float64)):
        if 1 <= original <= LONGEST and 1 < high < 1000:
            yield RopeScaling(
                factor=float(f"{factors.max():.6g}"),
                low_freq_factor=1.0,
                high_freq_factor=float(f"{high:.6g}"),
                original_ctx_len=round(original),
            )


def _candidates(factors: np.ndarray, frequencies: np.ndarray) -> Iterator[tuple[float, float]]:
    """What original context length and high_freq_factor may have been, where low_freq_factor is 1.

    A frequency f is divided by 1 / (b + (1 - b) / factor) with b = (original * f / 2π - 1) / (high - 1), cut to 0 … 1.
    """
    blend = (1 / factors - 1 / factors.max()) / (1 - 1 / factors.max())
    inside = (blend > 1e-3) & (blend < 1 - 1e-3)
    blend, turns = blend[inside], frequencies[inside] / (2 * np.pi)
    if len(blend) == 0:
        yield from ((float(2**doublings), 4.0) for doublings in range(25))
    else:
        yield float((1 + 3 * blend[0]) / turns[0]), 4.0  # as every known model has it
    if len(blend) > 1:
        (original, above), *_ = np.linalg.lstsq(np.stack([turns, -blend], axis=1), np.ones(len(blend)), rcond=None)
        yield float(original), float(1 + above)


def rope_factors(config: ThinkerConfig) -> np.ndarray:
    """By what each frequency is divided, (head_dim / 2,) float32."""
    plain = inverse_frequencies(config.changed(rope_scaling=None))
    return (plain.astype(np.float64) / inverse_frequencies(config)).astype(np.float32)


def write_config(writer: GGUFWriter, config: ThinkerConfig) -> None:
    """Hand an architecture over to gguf-py."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.ctx_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        writer.add_string(OWN_SCALING, config.rope_scaling.model_dump_json())
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.use_qk_norm:
            writer.add_expert_feed_forward_length(config.d_ff)
