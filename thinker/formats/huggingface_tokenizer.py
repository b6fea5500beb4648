"""What a Hugging Face folder says about text: `tokenizer.json`, special tokens, the chat template, both ways.

Only looked at and passed on: nothing is tokenised in here (`tokenizer.py`), and no template is run (`chat.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import parse_json, read_json, read_text


def read_text_files(folder: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The fields of `ModelFiles` that belong to text; `config` holds the keys of `config.json`.

    A folder without tokenizer is fine. A tokenizer with more ids than the model raises `ValueError` with both numbers.
    """
    generation = _optional_json(folder / "generation_config.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    text = read_text(path) if path.exists() else None
    tokenizer = parse_json(text, str(path)) if text is not None else {}
    ids = token_ids(tokenizer, str(path)) if text is not None else {}
    if ids and max(ids.values()) >= vocab_size:
        raise ValueError(f"{path}: has ids up to {max(ids.values())}, the model's vocab_size is {vocab_size}")

    def special(name: str) -> tuple[int, ...]:
        """Ids of one kind; what lies outside the vocabulary can be neither read nor written, and doesn't count."""
        token = _content(settings.get(f"{name}_token"))
        given = [source.get(f"{name}_token_id") for source in (generation, config)]
        found = next((value for value in given if value is not None), None)
        if found is None and token is not None:
            found = ids.get(token)
        values = found if isinstance(found, list) else [found]
        return tuple(value for value in values if type(value) is int and 0 <= value < vocab_size)

    bos = _first(special("bos"))
    leading = _leading_token(tokenizer.get("post_processor"))
    if text is not None and "bos_token" in settings:
        bos = ids.get(_content(settings["bos_token"]) or "")
    if leading is not None:
        bos = leading
    return {
        "tokenizer_json": text,
        "chat_template": _chat_template(folder, settings),
        "bos_id": bos,
        "eos_ids": special("eos"),
        "pad_id": _first(special("pad")),
        "add_bos": leading is not None or (settings.get("add_bos_token") is True and bos is not None),
    }


def write_tokenizer_config(
    tokenizer_json: str,
    ctx_len: int,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int | None,
    add_bos: bool,
    chat_template: str | None,
) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    texts = {number: token for token, number in token_ids(parse_json(tokenizer_json, "tokenizer"), "tokenizer").items()}
    special = {"bos_token": bos_id, "eos_token": _first(eos_ids), "pad_token": pad_id}
    for kind, number in special.items():
        if number is not None and number not in texts:
            raise ValueError(f"tokenizer: has no id {number}, which is given as its {kind}")
    values: dict[str, Any] = {
        # Without this class transformers guesses one, which may add a token and shift ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{kind: None if number is None else texts[number] for kind, number in special.items()},
        "add_bos_token": add_bos,
        "model_max_length": ctx_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        values["chat_template"] = chat_template
    return values


def put_bos_in_front(tokenizer_json: str, bos_id: int) -> str:
    """The same tokenizer with a post-processor that begins every text with bos, unless it has one that does.

    transformers takes the post-processor's word and ignores `add_bos_token`. Thinker encodes without either.
    """
    values = parse_json(tokenizer_json, "tokenizer")
    existing = values.get("post_processor")
    if _leading_token(existing) is not None:
        return tokenizer_json
    token = next((token for token, number in token_ids(values, "tokenizer").items() if number == bos_id), None)
    if token is None:
        raise ValueError(f"tokenizer: has no id {bos_id}, which is given as its bos_token")

    def text(kind: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": token, "type_id": type_id}},
            {"Sequence": {"id": kind, "type_id": type_id}},
        ]

    template = {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {token: {"id": token, "ids": [bos_id], "tokens": [token]}},
    }
    values["post_processor"] = (
        template if existing is None else {"type": "Sequence", "processors": [existing, template]}
    )
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def token_ids(tokenizer: Mapping[str, Any], where: str) -> dict[str, int]:
    """Every token of a `tokenizer.json` with its id."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram: pairs of token and score, in the order of their ids
        vocab = {item[0]: number for number, item in enumerate(vocab) if isinstance(item, list) and item}
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError(f"{where}: is no tokenizer.json of the tokenizers library: it has no model with a vocabulary")
    ids = dict(vocab)
    for item in added:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise ValueError(f"{where}: an added token has no content")
        ids[item["content"]] = item.get("id")
    if not all(isinstance(token, str) and type(number) is int and number >= 0 for token, number in ids.items()):
        raise ValueError(f"{where}: its vocabulary must map tokens to ids from 0")
    return ids


def _leading_token(processor: Any) -> int | None:
    """The id that a post-processor puts in front of every text, if it does."""
    if not isinstance(processor, dict):
        return None
    for inner in processor.get("processors") or []:  # of a Sequence
        if (found := _leading_token(inner)) is not None:
            return found
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
        return None
    token = single[0].get("SpecialToken") if isinstance(single[0], dict) else None
    name, known = _text_of(token, "id"), processor.get("special_tokens")
    entry = known.get(name) if isinstance(known, dict) else None
    ids = entry.get("ids") if isinstance(entry, dict) else None
    return ids[0] if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template, from its own file (transformers 5) or from `tokenizer_config.json`, the default one of several."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """A special token's text, given alone or as an object."""
    return token if isinstance(token, str) else _text_of(token, "content")


def _text_of(values: Any, key: str) -> str | None:
    """What an object has under a key, where it is an object and that is a text."""
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, str) else None


def _first(values: tuple[int, ...]) -> int | None:
    return values[0] if values else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
