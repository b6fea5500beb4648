"""What a conversation is made of: messages with a role and a content, which is a text or a list of parts.

A part is {"type": "text", "text": …}, {"type": "image", "image": FILE}, or the same with "audio"; FILE is a path or a
data URI, and may also stand under "path" or "url". Here they are checked and taken apart. How they become tokens is in
`chat.py`, what is in a file in `modality/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Part = Mapping[str, Any]
Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "audio")
FILE_KEYS = ("path", "url")  # what others call the key that is named after the type here


def parts_of(content: str | Sequence[Part]) -> Sequence[Part]:
    """A content as parts; a text is one of them."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(content: str | Sequence[Part]) -> str:
    """What a content says in words."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def media_parts(content: str | Sequence[Part]) -> list[Part]:
    """The pictures and sounds of a content, in order."""
    return [part for part in parts_of(content) if part["type"] != "text"]


def file_of(part: Part) -> str:
    """The path or data URI of a picture or a sound."""
    return next(part[key] for key in (part["type"], *FILE_KEYS) if key in part)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `ValueError` that says which message is none, and why."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError('messages: give a list of at least one {"role": …, "content": …}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f'message {number} is {message!r}: give {{"role": …, "content": …}}')
        unknown = sorted(message.keys() - {"role", "content"})
        if unknown:
            raise ValueError(f"message {number} has the unknown key {unknown[0]!r}: give role and content")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} has role {message.get('role')!r}: choose among {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            _check_parts(message.get("content"), number, message["role"])


def _check_parts(content: Any, number: int, role: str) -> None:
    if not isinstance(content, list | tuple) or not content:
        raise ValueError(f"message {number} has content {content!r}: give a text, or a list of parts")
    for place, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        where = f"message {number}, part {place}"
        if not isinstance(kind, str) or kind not in PART_TYPES:
            raise ValueError(f"{where} has type {kind!r}: choose among {', '.join(PART_TYPES)}")
        keys = part.keys() - {"type"}
        names = (kind,) if kind == "text" else (kind, *FILE_KEYS)
        key = next((name for name in names if name in keys), kind)
        if unknown := sorted(keys - {key}):
            raise ValueError(f"{where} has the unknown key {unknown[0]!r}: give type and {kind}")
        if not isinstance(part.get(key), str) or (kind != "text" and not part[key]):
            raise ValueError(f'{where} needs a text under {kind!r}: {{"type": "{kind}", "{kind}": "…"}}')
        if kind != "text" and role == "assistant":
            raise ValueError(f"{where} is {kind} in the assistant's turn: the model answers in text")
