"""A conversation as `thinker chat` holds it: what was said, how much of it the model still sees, and asking it.

The model's cache keeps what a conversation shares with the one before (`llm.py`), so nothing is computed twice while it
grows. When the context is full the oldest exchanges are dropped, the system message never. Typing and commands are in
`chat.py` and `lines.py`.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..llm import LLM, Notice
from ..llm import Options as Writing
from ..messages import text_of
from ..places import expand_home

Said = dict[str, Any]
Content = str | list[Said]

SHOWN = 40  # characters by which an exchange is recognised


class Conversation:
    """Exchanges of a user's message and a reply, under a system message that may be empty."""

    def __init__(self, llm: LLM, writing: Writing, notice: Notice, system: str = "") -> None:
        self._llm, self._writing, self._notice = llm, writing, notice
        self._exchanges: list[tuple[Said, Said]] = []
        self._first = 0  # of the exchanges that the model still sees
        self._system = ""
        self._attached: list[Said] = []
        self.tell(system)

    def tell(self, system: str) -> None:
        """Set the system message; empty takes it away.

        Raises `ValueError` if the model's template knows none, or if it leaves no room for a conversation.
        """
        before, self._system = self._system, system
        try:
            length, ctx_len = self._length("", len(self._exchanges)), self._llm.config.ctx_len
            if length >= ctx_len:
                raise ValueError(f"the system message takes {length} of the context's {ctx_len} tokens: shorten it")
        except ValueError:
            self._system = before
            raise

    def attach(self, file: Path) -> None:
        """Have a picture or a sound go with the next message. Raises `ValueError` for one that can't be used."""
        from ..modality.media import attachment

        part = attachment(expand_home(file).absolute())  # so that a saved conversation finds it from anywhere
        self._llm.prompt_length([{"role": "user", "content": [part]}])
        self._attached.append(part)

    def reset(self) -> None:
        """Forget every exchange and what waits for the next; the system message stays."""
        self._exchanges, self._first, self._attached = [], 0, []

    def save(self, path: Path) -> int:
        """Append the whole conversation to a file as one line that `thinker train --chat` reads; how many exchanges.

        What was dropped from the context is in it too. Raises `ValueError` if there is nothing, or no way to write.
        """
        if not self._exchanges:
            raise ValueError("nothing has been said yet, so there is nothing to save")
        line = json.dumps({"messages": self._messages(0)}, ensure_ascii=False)
        try:
            with expand_home(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ValueError(f"{path}: can't be written ({error.strerror})") from None
        return len(self._exchanges)

    def ask(self, text: str) -> Generator[str, None, None]:
        """The reply as it comes. Broken off, what came counts. Raises `ValueError` if the message alone is too long."""
        content = [*self._attached, {"type": "text", "text": text}] if self._attached else text
        self._make_room(content)
        question = {"role": "user", "content": content}
        stream = self._llm.stream_chat([*self._messages(self._first), question], **self._writing)
        self._attached = []  # not before: a message that is refused is written anew, and they go with that
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            self._exchanges.append((question, {"role": "assistant", "content": "".join(said)}))

    def _messages(self, first: int) -> list[Said]:
        beginning = [{"role": "system", "content": self._system}] if self._system else []
        return [*beginning, *(message for exchange in self._exchanges[first:] for message in exchange)]

    def _length(self, content: Content, first: int | None = None) -> int:
        """Tokens of the prompt, with exchanges from `first` on."""
        seen = self._messages(self._first if first is None else first)
        return self._llm.prompt_length([*seen, {"role": "user", "content": content}])

    def _make_room(self, content: Content) -> None:
        """Drop the oldest exchanges if a quarter of the context isn't free for the reply, and say so.

        Then as many go as make twice that room, so that it doesn't happen at every message: what is left is computed
        anew.
        """
        ctx_len, exchanges = self._llm.config.ctx_len, len(self._exchanges)
        reply = min(self._writing["max_new_tokens"], max(ctx_len // 4, 1))
        alone = self._length(content, exchanges)
        if alone >= ctx_len or self._length(content) + reply <= ctx_len:
            return
        first = self._first
        while first < exchanges and self._length(content, first) + 2 * reply > ctx_len:
            first += 1
        if first == self._first:
            return
        dropped, self._first = self._exchanges[self._first : first], first
        oldest = " ".join(text_of(dropped[0][0]["content"]).split())
        self._notice(
            f"the context of {ctx_len} tokens is full: dropped the oldest "
            f"{'exchange' if len(dropped) == 1 else f'{len(dropped)} exchanges'}, "
            f"from {oldest[:SHOWN] + '…' * (len(oldest) > SHOWN)!r} on"
            f"{', and kept the system message' if self._system else ''}"
        )
