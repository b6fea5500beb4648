"""Conversations: reading `messages` from .jsonl files and named sets, checking them, and what is held out.

What can't be read as a conversation is refused: broken JSON, a row without `messages`, a message that is none. What
can be read but not learned from is skipped: no assistant turn, roles in a wrong order; and later (`chat_shards.py`)
what the template refuses or the context is too short for. Either way it is counted and named with its line number.

One conversation in 25 is held out by a stable hash of what precedes its first reply, so that a question that is asked
twice has one side; if that is not 1 to 15 % of them, then the last 5 %. Tokens are no concern of this room.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..messages import Message, Part, check_messages, media_parts, text_of
from ..modality.media import Medium, medium_of
from ..places import expand_home
from .digits import DIGIT_SETS, DigitSet
from .named import TRAINING_SETS
from .questions import CHAT_SETS, StandardLibraryQuestions
from .reading import NO_DATA, Document, file_state, files_below, readable, text_document
from .split import HELD_OUT_TAIL, Split, held_out

CHAT_NAMES = (*CHAT_SETS, *(name for name in DIGIT_SETS if ":" not in name))
CHAT_SUFFIXES = frozenset({".jsonl"})
SHOWN = 10  # places named in one line

NO_REPLY = "without an assistant turn"
WRONG_ORDER = "with roles in a wrong order (right is: system if any, then user and assistant in turn)"

# Which roles may follow a role; "" is the beginning.
_FOLLOWERS = {
    "": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}


@dataclass(frozen=True)
class Conversation:
    """Messages that can be learned from, and where they stand."""

    where: str
    messages: tuple[Message, ...]
    folder: Path | None = None  # where paths of pictures and sounds begin

    @property
    def key(self) -> str:
        """What is hashed: everything before the first reply."""
        before = itertools.takewhile(lambda message: message["role"] != "assistant", self.messages)
        return json.dumps([[message["role"], message["content"]] for message in before])

    @property
    def size(self) -> int:
        """Bytes of what is said."""
        return sum(len(text_of(message["content"]).encode()) for message in self.messages)

    @property
    def media(self) -> list[Medium]:
        """Its pictures and sounds in order. Raises `ValueError` for what can't be one."""
        return [medium_of(part, self.folder) for message in self.messages for part in media_parts(message["content"])]

    @property
    def with_whole_paths(self) -> tuple[Message, ...]:
        """The messages, with paths of pictures and sounds that don't depend on the file they stand in."""

        def whole(part: Part) -> Part:
            path = medium_of(part, self.folder).path if part["type"] != "text" else None
            return part if path is None else {"type": part["type"], part["type"]: str(path)}

        contents = [message["content"] for message in self.messages]
        wholes = [content if isinstance(content, str) else [whole(part) for part in content] for content in contents]
        return tuple({**message, "content": content} for message, content in zip(self.messages, wholes, strict=True))


@dataclass(frozen=True)
class Skipped:
    """A conversation that is left out, and why."""

    where: str
    reason: str


@dataclass
class Tally:
    """What was left out: for each reason all places, in order."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, skipped: Skipped) -> None:
        """Count one more."""
        self.places.setdefault(skipped.reason, []).append(skipped.where)

    def lines(self) -> Iterator[str]:
        """One line for each reason, with count and places."""
        for reason, places in self.places.items():
            yield f"skipped {counted(len(places), 'conversation')} {reason}: {listed(places)}"


def counted(number: int, what: str) -> str:
    """ "1 conversation", "2,000 conversations"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(places: Sequence[str]) -> str:
    """The first few places, and how many more there are: "a.jsonl, line 3; line 7; b.jsonl, line 1 and 4 more"."""
    shown, file = [], None
    for place in places[:SHOWN]:
        before, _, line = place.rpartition(", ")
        shown.append(line if before == file else place)
        file = before
    more = len(places) - SHOWN
    return "; ".join(shown) + (f" and {more:,} more" if more > 0 else "")


class ChatSource(ABC):
    """One thing that `--data` named, with `--chat`."""

    name: str

    @abstractmethod
    def everything(self) -> Iterator[Conversation | Skipped]:
        """All conversations in a fixed order. Raises `ValueError` for what is none."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON values that change when the conversations may have changed."""

    @cached_property
    def _survey(self) -> tuple[int, int | None, int]:
        """How many, from which on they are held out (None if the hash decides), and the bytes in all."""
        total = hashed = size = 0
        for conversation in self.everything():
            if isinstance(conversation, Conversation):
                total += 1
                hashed += held_out(conversation.key)
                size += conversation.size
        by_hash = 0.01 * total <= hashed <= 0.15 * total and hashed > 0
        return total, None if by_hash else min(int(total * (1 - HELD_OUT_TAIL)), total - 1), size

    def size(self) -> int:
        """Bytes of what is said."""
        return self._survey[2]

    def sides(self) -> Iterator[tuple[Split, Conversation] | Skipped]:
        """Every conversation with the side it is on."""
        _, border, _ = self._survey
        number = 0
        for conversation in self.everything():
            if isinstance(conversation, Skipped):
                yield conversation
                continue
            aside = held_out(conversation.key) if border is None else number >= border
            yield "valid" if aside else "train", conversation
            number += 1


@dataclass(frozen=True)
class ChatSources:
    """Everything that `--data` named: sets in the order given, then all files and folders."""

    sources: tuple[ChatSource, ...]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def sides(self) -> Iterator[tuple[Split, Conversation] | Skipped]:
        return itertools.chain.from_iterable(source.sides() for source in self.sources)

    def documents(self, split: Split) -> Iterator[Document]:
        """What is said, each message a text, for a tokenizer to be trained on."""
        for item in self.sides():
            if not isinstance(item, Skipped) and item[0] == split:
                texts = (text_of(message["content"]) for message in item[1].messages)
                yield from (text_document(text) for text in texts if text)

    def fingerprint(self) -> list[Any]:
        return [source.fingerprint() for source in self.sources]

    def size(self) -> int:
        return sum(source.size() for source in self.sources)


def open_chats(values: Sequence[str]) -> ChatSources:
    """The conversations to train on. A value is a named set of them, else a .jsonl file, or a folder of such.

    Raises `ValueError` for what can't be found.
    """
    values = list(dict.fromkeys(values))
    if text := next((value for value in values if value in TRAINING_SETS), None):
        raise ValueError(
            f"{text}: is text, no conversations: drop --chat, or name {', '.join(CHAT_NAMES)} or a .jsonl file"
        )
    sources: list[ChatSource] = [NamedChats(CHAT_SETS[value]) for value in values if value in CHAT_SETS]
    sources += [DigitChats(DIGIT_SETS[value]) for value in values if value in DIGIT_SETS]
    if paths := [value for value in values if value not in CHAT_SETS | DIGIT_SETS]:
        sources.append(ChatFiles(paths))
    return ChatSources(tuple(sources))


class NamedChats(ChatSource):
    """A set that is made here."""

    def __init__(self, made: StandardLibraryQuestions) -> None:
        self.name, self._made = made.name, made

    def everything(self) -> Iterator[Conversation]:
        for where, messages in self._made.conversations:
            yield Conversation(where, tuple(messages))

    def fingerprint(self) -> list[Any]:
        return self._made.fingerprint()


class DigitChats(ChatSource):
    """Pictures and sounds of digits, which say themselves what is held out."""

    def __init__(self, made: DigitSet) -> None:
        self.name, self._made = made.name, made

    def everything(self) -> Iterator[Conversation]:
        for _, where, messages in self._made.conversations:
            yield Conversation(where, messages)

    def sides(self) -> Iterator[tuple[Split, Conversation] | Skipped]:
        for side, where, messages in self._made.conversations:
            yield side, Conversation(where, messages)

    def fingerprint(self) -> list[Any]:
        return self._made.fingerprint()


class ChatFiles(ChatSource):
    """Files of one conversation a line, {"messages": [{"role": …, "content": …}, …]}; other fields don't matter."""

    def __init__(self, values: Sequence[str]) -> None:
        self.name = ", ".join(values)
        found: dict[Path, None] = {}
        for value in values:
            if not value:  # a path of nothing would be the folder one is in
                raise ValueError(NO_DATA)
            path = expand_home(value)
            if path.is_dir():
                inside = list(files_below(path, CHAT_SUFFIXES).values())
                if not inside:
                    raise ValueError(f"{value}: no .jsonl file in this folder: conversations are read from such")
            elif not path.exists():
                raise ValueError(
                    f"{value}: no such file or folder, and no named set of conversations ({', '.join(CHAT_NAMES)})"
                )
            elif not path.is_file():  # a pipe, which is empty at the second reading
                raise ValueError(
                    f"{value}: no regular file, and conversations are read more than once: save them in one first"
                )
            elif path.suffix.lower() not in CHAT_SUFFIXES:
                raise ValueError(f"{value}: with --chat give .jsonl files, one conversation a line under messages")
            else:
                inside = [path]
            found |= dict.fromkeys(file.resolve() for file in inside)
        self._files = list(found)

    def fingerprint(self) -> list[Any]:
        return [[str(path), *file_state(path)] for path in self._files]

    def everything(self) -> Iterator[Conversation | Skipped]:
        """All of all files. What is refused is collected first, so that one message names every place."""
        refused: list[tuple[str, str]] = []
        for path in self._files:
            with readable(path), path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    where = f"{path}, line {number}"
                    try:
                        conversation = Conversation(where, messages_in(line), path.parent)
                    except ValueError as error:
                        refused.append((where, str(error)))
                        continue
                    problem = unusable(conversation.messages)
                    if not refused:
                        yield conversation if problem is None else Skipped(where, problem)
        if refused:
            where, mistake = refused[0]
            others = [place for place, _ in refused[1:]]
            rest = f"; and {counted(len(others), 'other line')} can't be read: {listed(others)}" if others else ""
            raise ValueError(f"{where}: {mistake}{rest}: mend or remove {'them' if others else 'it'}")


def messages_in(line: bytes) -> tuple[Message, ...]:
    """The conversation of one line. Raises `ValueError` that says why it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError('needs a list under "messages"')
    check_messages(row["messages"])
    try:
        "".join(text_of(message["content"]) for message in row["messages"]).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no character") from None
    return tuple(row["messages"])


def unusable(messages: Sequence[Message]) -> str | None:
    """Why nothing can be learned from a conversation; None if something can."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return NO_REPLY
    in_order = all(role in _FOLLOWERS[before] for before, role in itertools.pairwise(["", *roles]))
    return None if in_order else WRONG_ORDER
