"""Byte-level BPE between `tokenizer.json` and GGUF's metadata, for the ways of cutting text that both sides know.

llama.cpp knows a way of cutting by a name, `pre`, that stands for patterns in its source; here is the list of those
that a `tokenizer.json` expresses exactly. Anything else is refused by name: other cuts give other tokens, silently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.files import brief, parse_json
from .gguf_file import GGUFFile
from .huggingface_tokenizer import token_ids

# The types of tokens in tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _BYTES | {"use_regex": False}]}


@dataclass(frozen=True)
class Way:
    """One way of cutting text before BPE, and what llama.cpp ties to its name."""

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = Way(_BYTES)
_DIGITS = Way({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]})
_LLAMA3 = Way(_split(_CUT % r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
# llama.cpp doesn't normalise; every tokenizer.json of this kind does.
_QWEN2 = Way(_split(_CUT % r"\p{N}"), normalizer={"type": "NFC"})
WAYS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    # Other names for the same patterns, in files of other models.
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "deepseek-r1-qwen": _QWEN2,
}


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary as GGUF has it: one token, with its type, for every row of the embedding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def to_vocabulary(tokenizer_json: str, vocab_size: int, where: str) -> Vocabulary:
    """What GGUF needs of a `tokenizer.json`. What it can't carry raises `ValueError` by name."""
    values = parse_json(tokenizer_json, where)
    ids = token_ids(values, where)
    model = values["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"{where}: GGUF gets byte-level BPE from Thinker, and this tokenizer is of another kind")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{where}: the tokenizer has {key}, which GGUF doesn't carry")
    pre = _name_of(values, bool(model.get("ignore_merges")), where)
    if max(ids.values(), default=-1) >= vocab_size:
        raise ValueError(f"{where}: has ids up to {max(ids.values())}, the model's vocab_size is {vocab_size}")

    # llama.cpp wants a token of its own for every row.
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in ids.items():
        if types[number] != UNUSED:
            raise ValueError(f"{where}: {tokens[number]!r} and {token!r} share the id {number}")
        tokens[number], types[number] = token, NORMAL
    for item in values.get("added_tokens") or []:
        if item.get("lstrip") or item.get("rstrip") or item.get("single_word"):
            raise ValueError(f"{where}: {item['content']!r} takes the spaces beside it, which GGUF doesn't carry")
        types[item["id"]] = CONTROL if item.get("special") else USER_DEFINED
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{where}: a token reads like the padding of an unused one ([PAD…]): rename it")
    return Vocabulary(pre, tokens, types, _merges(model, tokens, types, where))


def to_tokenizer_json(vocabulary: Vocabulary, where: str) -> str:
    """The `tokenizer.json` of a vocabulary from GGUF. Ways of cutting not known here raise `ValueError` by name."""
    way = WAYS.get(vocabulary.pre)
    if way is None:
        known = ", ".join(WAYS)
        raise ValueError(f"{where}: tokenizer.ggml.pre '{brief(vocabulary.pre)}' is not supported, only {known}")
    vocab: dict[str, int] = {}
    added = []
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == UNUSED:
            continue
        if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED):
            raise ValueError(f"{where}: token {number} has the type {kind}, which byte-level BPE doesn't have")
        if token in vocab:
            raise ValueError(f"{where}: tokens {vocab[token]} and {number} are both {token[:80]!r}")
        vocab[token] = number
        if kind != NORMAL:
            added.append(added_token(token, number, kind != USER_DEFINED))
    controls = {item["content"] for item in added}
    merges = []
    for merge in vocabulary.merges:
        pair = merge.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{where}: the merge {merge[:80]!r} is no pair")
        if controls.issuperset(pair):  # stands for none: see _merges
            continue
        if not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(f"{where}: the merge {merge[:80]!r} speaks of tokens that don't exist")
        merges.append(pair)
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": way.normalizer,
        "pre_tokenizer": way.pre_tokenizer,
        "post_processor": None,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": way.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return json.dumps(values, ensure_ascii=False)


def added_token(token: str, number: int, special: bool) -> dict[str, Any]:
    """An entry of a `tokenizer.json` for a token that is found in the text before anything else happens to it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **plain, "special": special}


def read_tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """The tokens in the metadata of a GGUF file, and the type of each."""
    tokens, types = file.fields.get("tokenizer.ggml.tokens"), file.fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise file.fail("its tokenizer has no tokens")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise file.fail(f"tokenizer.ggml.token_type must give one type for each of {len(tokens)} tokens")
    return tokens, types.tolist()


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """The byte-level BPE vocabulary in the metadata of a GGUF file."""
    tokens, types = read_tokens(file)
    pre, merges = file.scalar("tokenizer.ggml.pre"), file.fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise file.fail("its tokenizer has no merges")
    return Vocabulary("default" if pre is None else str(pre), tokens, types, merges)


def _merges(model: dict[str, Any], tokens: Sequence[str], types: Sequence[int], where: str) -> list[str]:
    """The merges as GGUF writes them, pairs with a space between."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    if not all(isinstance(pair, list) and len(pair) == 2 and " " not in pair[0] + pair[1] for pair in pairs):
        raise ValueError(f"{where}: its merges are not pairs of tokens without spaces")
    if pairs:
        return [" ".join(pair) for pair in pairs]
    # llama.cpp wants merges, and gguf-py writes no empty list. Two control tokens never meet inside a piece of text.
    control = next((token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL), None)
    if control is None:
        raise ValueError(f"{where}: has neither merges nor a control token, and llama.cpp needs a merge")
    return [f"{control} {control}"]


def _name_of(values: dict[str, Any], ignore_merges: bool, where: str) -> str:
    """llama.cpp's name for the way in which a `tokenizer.json` cuts text."""
    cut = _steps(values.get("pre_tokenizer"))
    normalizer = values.get("normalizer")
    for name, way in WAYS.items():
        if _steps(way.pre_tokenizer) == cut and way.ignore_merges == ignore_merges and way.normalizer == normalizer:
            return name
    kinds = [step.get("type") for step in cut] + ([normalizer.get("type")] if isinstance(normalizer, dict) else [])
    known = "gpt-2 (ByteLevel), smollm, llama-bpe, qwen2"
    raise ValueError(f"{where}: llama.cpp has no name for how this tokenizer cuts text ({kinds}); it knows {known}")


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in one row, without what leaves the tokens alone."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for inner in pre_tokenizer.get("pretokenizers") or [] for step in _steps(inner)]
    step = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    return [{"use_regex": True, **step} if step.get("type") == "ByteLevel" else step]
