"""Decoding: Thinker's native decoder, llama.cpp, transformers' `generate`; one stream and many, prefill, cold start.

    python -m benchmarks.decode [one-float32] [one-int8] [cached] [streams] [prefill] [sampling] [cold-start] …

Prompts have 16 tokens and are part of the time, unless said. llama.cpp runs with one thread and with all, and keys and
values in float16, its default, and in float32, which Thinker has; the best of these counts. The weights are random, so
that of what INT8 drafts for float32 less is right than a trained model has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import thinker
from thinker.compiled.processor import processors

from . import models
from .results import Figure, Line, Match, Results, Target, median, quartiles, ratio, worst
from .run import main
from .turns import Contestant

OURS = "benchmarks.contestants.ours:"
TRANSFORMERS = "benchmarks.contestants.huggingface:decode"
TINY = str(models.TINY)


def ours(name: str, task: str = "decode", model: Path = models.TINY, **options: Any) -> Contestant:
    """Thinker, natively."""
    return Contestant(name, OURS + task, {"model": str(model)} | options)


def llamacpp(kind: str, task: str = "decode", model: Path = models.TINY, **options: Any) -> list[Contestant]:
    """llama.cpp with every number of threads and type of keys and values that may be its best."""
    return [
        Contestant(
            f"llama.cpp {kind.upper()}, {threads} thread{'s' if threads > 1 else ''}, {cache} keys and values",
            f"benchmarks.contestants.llamacpp:{task}",
            {"model": str(models.gguf(model, kind)), "threads": threads, "keys_and_values": cache} | options,  # type: ignore[arg-type]
        )
        for threads in sorted({1, processors()})
        for cache in ("float16", "float32")
    ]


def names(contestants: Sequence[Contestant]) -> list[str]:
    """Who they are."""
    return [contestant.name for contestant in contestants]


# One stream

FLOAT32, INT8 = "Thinker float32", "Thinker INT8"
ONE_BY_ONE = f"{FLOAT32} without drafts"
LLAMA_F32, LLAMA_BF16, LLAMA_Q8 = llamacpp("f32"), llamacpp("bf16"), llamacpp("q8_0")
GENERATE = [
    Contestant(f"transformers, {cache} cache", TRANSFORMERS, {"model": TINY, "cache": cache})
    for cache in ("dynamic", "static")
]


def judge_float32(results: Results) -> Sequence[Line]:
    """Against llama.cpp and transformers."""
    return [
        Line(
            Target("decoding one stream, float32, against llama.cpp F32 at its better thread count", 1.5, 2.5),
            ratio(results, FLOAT32, names(LLAMA_F32)),
        ),
        Line(Target("… against transformers generate", 10, 25), ratio(results, FLOAT32, names(GENERATE))),
    ]


def judge_int8(results: Results) -> Sequence[Line]:
    """Against llama.cpp's Q8_0."""
    target = Target("decoding one stream, INT8, against llama.cpp Q8_0", 1.3, 2.5)
    return [Line(target, ratio(results, INT8, names(LLAMA_Q8)))]


# The cache

CACHED, UNCACHED = "from the cache", "all 500 tokens again"


def judge_cached(results: Results) -> Sequence[Line]:
    """What the cache saves."""
    target = Target("… cached against uncached at 500 tokens of context", 10, 50)
    return [Line(target, ratio(results, CACHED, [UNCACHED]))]


GQA, FULL = "2 key/value heads for 4", "4 key/value heads"


def judge_gqa(results: Results) -> Sequence[Line]:
    """Memory, exactly."""
    figure = None
    if GQA in results and FULL in results:
        small, large = (results[name].about["bytes of keys and values"] for name in (GQA, FULL))
        figure = Figure(small / large, small / large, small / large, f"{small:,} / {large:,} bytes of one text's cache")
    return [Line(Target("key/value memory with GQA (4 → 2)", 0.5, None, "of the bytes", True), figure)]


# Many streams

MANY = (8, 32)


def judge_streams(results: Results) -> Sequence[Line]:
    """32 at once against transformers' batch of 32."""
    line = "32 streams at once against transformers generate at batch 32: "
    goals = ((FLOAT32, "float32", 4, 6), (INT8, "INT8", 5, 10))
    return [
        Line(Target(line + kind, least, dream), ratio(results, f"{name}, 32 streams", ["transformers, batch 32"]))
        for name, kind, least, dream in goals
    ]


# Prompts and draws

PREFILL_F32 = llamacpp("f32", "prefill")


def judge_prefill(results: Results) -> Sequence[Line]:
    """Against llama.cpp's F32."""
    target = Target("prefill of 500 tokens against llama.cpp F32", 0.8, 1.3)
    return [Line(target, ratio(results, FLOAT32, names(PREFILL_F32)))]


def judge_sampling(results: Results) -> Sequence[Line]:
    """What a token costs more, without drafts, which foresee greedy texts better; the larger of float32 and INT8."""
    target = Target("sampling with top-p 0.95 instead of greedy: cost of a token", 1.15, 1.05, at_most=True)
    return [Line(target, worst([ratio(results, f"{name}, greedy", [f"{name}, top-p"]) for name in (ONE_BY_ONE, INT8)]))]


# Starting

PROMPT = "def "
PROGRAM = str(Path(sys.executable).with_name("thinker"))
OUR_START, THEIR_START = "thinker generate", "transformers"


def judge_start(results: Results) -> Sequence[Line]:
    """Against transformers, and in seconds."""
    line = "cold start of `thinker generate`, command to first token, warm disk"
    seconds = None
    if OUR_START in results:
        low, high = quartiles([1 / rate for rate in results[OUR_START].rates])
        seconds = Figure(1 / median(results[OUR_START]), low, high, OUR_START)
    return [
        Line(Target(f"{line}: against the same in transformers", 5), ratio(results, OUR_START, [THEIR_START])),
        Line(Target("… in seconds", 1.5, 0.7, "s", at_most=True), seconds),
    ]


# A model that people have

SMOLLM2_PEERS = llamacpp("q8_0", model=models.SMOLLM2, new=64)


def judge_smollm2(results: Results) -> Sequence[Line]:
    """The same Q8_0 file on both sides."""
    target = Target("SmolLM2-135M, INT8, decode against llama.cpp Q8_0", 0.9, 1.2)
    return [Line(target, ratio(results, INT8, names(SMOLLM2_PEERS)))]


DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "everything on": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
}

MATCHES: tuple[Match, ...] = (
    Match(
        "one-float32",
        "Decoding one stream, float32, 16 + 256 tokens",
        "tokens/s",
        (
            ours(FLOAT32, dtype="float32"),
            ours(ONE_BY_ONE, dtype="float32", drafts=False),
            ours("Thinker float32, in torch", dtype="float32", backend="torch"),
            *LLAMA_F32,
            *GENERATE,
        ),
        judge_float32,
        ("tiny",),
    ),
    Match(
        "one-int8",
        "Decoding one stream, INT8, 16 + 256 tokens",
        "tokens/s",
        (ours(INT8, dtype="int8"), *LLAMA_Q8, *LLAMA_BF16),
        judge_int8,
        ("tiny",),
    ),
    Match(
        "cached",
        "One token more at 500 tokens of context, float32",
        "tokens/s",
        tuple(
            ours(name, "next_token", dtype="float32", context=500, cached=cached)
            for name, cached in ((CACHED, True), (UNCACHED, False))
        ),
        judge_cached,
        ("tiny",),
    ),
    Match(
        "streams",
        "Decoding many streams at once, 16 + 256 tokens each",
        "tokens/s",
        (
            *(
                ours(f"{name}, {count} streams", dtype=dtype, streams=count)
                for count in MANY
                for name, dtype in ((FLOAT32, "float32"), (INT8, "int8"))
            ),
            *(
                Contestant(f"transformers, batch {count}", TRANSFORMERS, {"model": TINY, "streams": count})
                for count in MANY
            ),
        ),
        judge_streams,
        ("tiny",),
    ),
    Match(
        "prefill",
        "Prefill of 500 tokens",
        "tokens/s",
        (
            ours(FLOAT32, "prefill", dtype="float32"),
            ours(INT8, "prefill", dtype="int8"),
            *PREFILL_F32,
            *llamacpp("q8_0", "prefill"),
        ),
        judge_prefill,
        ("tiny",),
    ),
    Match(
        "sampling",
        "Greedy or drawn, 16 + 256 tokens",
        "tokens/s",
        tuple(
            ours(f"{name}, {how}", dtype=dtype, drafts=drafts, **sampling)
            for name, dtype, drafts in (
                (FLOAT32, "float32", True),
                (ONE_BY_ONE, "float32", False),
                (INT8, "int8", True),
            )
            for how, sampling in DRAWS.items()
        ),
        judge_sampling,
        ("tiny",),
    ),
    Match(
        "cold-start",
        "From the command to the first token, warm disk",
        "starts/s",
        (
            Contestant(
                OUR_START,
                "benchmarks.contestants.cold_start:command",
                {
                    "arguments": [PROGRAM, "generate", TINY, PROMPT, "--max-new-tokens", "1"],
                    "about": {"thinker": thinker.__version__},
                },
            ),
            Contestant(
                THEIR_START,
                "benchmarks.contestants.cold_start:command",
                {
                    "arguments": [sys.executable, "-m", "benchmarks.contestants.transformers_start", TINY, PROMPT],
                    "about": {name: version(name) for name in ("transformers", "torch")},
                },
            ),
        ),
        judge_start,
        ("tiny",),
    ),
    Match(
        "gqa",
        "Grouped-query attention, 16 + 256 tokens",
        "tokens/s",
        (ours(FULL, dtype="float32"), ours(GQA, model=models.TINY_GQA, dtype="float32")),
        judge_gqa,
        ("tiny", "tiny-gqa"),
    ),
    Match(
        "smollm2",
        "SmolLM2-135M in Q8_0, 16 + 64 tokens",
        "tokens/s",
        (ours(INT8, model=models.gguf(models.SMOLLM2, "q8_0"), dtype="int8", new=64), *SMOLLM2_PEERS),
        judge_smollm2,
        ("smollm2",),
    ),
)

if __name__ == "__main__":
    main(MATCHES)
