"""SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model = llama`) as `tokenizer.json`; reading only.

Such a file has a score for each token instead of merges: the two neighbours with the best score together are joined,
which is what BPE does with merges in the order of their scores. Byte-level BPE is in `gguf_tokenizer.py`.
"""

from __future__ import annotations

import json

import numpy as np

from .gguf_file import GGUFFile
from .gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, added_token, read_tokens

SPACE = "▁"
LONGEST = 128  # characters of a token; real ones have some 20, and splits are tried at every place


def sentencepiece_json(file: GGUFFile) -> str:
    """The `tokenizer.json` of a file's vocabulary. What can't be one raises `ValueError` that names the file."""
    tokens, types = read_tokens(file)
    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),) or not np.isfinite(scores).all():
        raise file.fail(f"tokenizer.ggml.scores must give one number for each of {len(tokens)} tokens")
    kinds = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    wrong = next((number for number, kind in enumerate(types) if kind not in kinds), None)
    if wrong is not None:
        raise file.fail(f"token {wrong} has the unknown type {types[wrong]}")
    vocab = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    if len(vocab) != sum(kind != UNUSED for kind in types):
        raise file.fail("two tokens of its vocabulary have the same text")
    missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab), None)
    if missing is not None:
        raise file.fail(f"its vocabulary has no token for the byte <0x{missing:02X}>")
    if max(map(len, tokens)) > LONGEST:
        raise file.fail(f"a token has {max(map(len, tokens))} characters, {LONGEST} are possible")

    pieces = [token for token, number in vocab.items() if types[number] == NORMAL]
    pieces.sort(key=lambda token: -scores[vocab[token]])
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = file.scalar("tokenizer.ggml.add_space_prefix") is not False
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(token, number, types[number] != USER_DEFINED)
            for token, number in vocab.items()
            if types[number] in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return json.dumps(values, ensure_ascii=False)
