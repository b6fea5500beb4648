"""How often a model answers conversations exactly as the data do: greedy replies, compared as text.

Of a conversation the last reply is asked for, given everything before it, pictures and sounds included. Loss and bits
per byte of texts are `evaluate.py`'s; where it is shown is the callers' business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .data.chats import CHAT_NAMES, Conversation, Skipped, Tally, open_chats
from .data.digits import DIGIT_SETS
from .llm import LLM
from .messages import Message, text_of
from .modality.settings import NotInstalled

AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What was asked, what is right, and what the model said."""

    asked: tuple[Message, ...]
    right: str
    said: str

    @property
    def exact(self) -> bool:
        """Whether both are the same text, but for space around it."""
        return self.said.strip() == self.right.strip()

    @property
    def words(self) -> str:
        """The words of the question."""
        return text_of(self.asked[-1]["content"])


def conversations_of(name: str, tally: Tally | None = None) -> list[Conversation]:
    """What to ask: of a named set what is held out, else all; what is skipped goes into the tally.

    Raises `ValueError` if there is nothing.
    """
    held_out_only = name in DIGIT_SETS or name in CHAT_NAMES
    found = []
    for item in open_chats([name]).sides():
        if isinstance(item, Skipped):
            if tally is not None:
                tally.add(item)
        elif held_out_only and item[0] != "valid":
            continue
        elif item[1].messages[-1]["role"] == "assistant":
            found.append(item[1])
    if not found:
        raise ValueError(f"{name}: holds no conversation that ends with the assistant's turn")
    return found


def answers(
    llm: LLM,
    conversations: Sequence[Conversation],
    max_new_tokens: int = 64,
    progress: Callable[[int], None] | None = None,
    tally: Tally | None = None,
) -> list[Answer]:
    """Ask all of them. `progress` is given the number of conversations done since it was last called.

    What can't be asked goes into the tally. Without one it raises `ValueError`, and answers to others are lost.
    """
    given: list[Answer] = []
    _ = llm.chat_format  # a model that holds no conversations says so once, and not of each
    for start in range(0, len(conversations), AT_ONCE):
        batch = conversations[start : start + AT_ONCE]
        some = batch if tally is None else [one for one in batch if askable(llm, one, tally)]
        asked = [one.with_whole_paths for one in some]
        said = llm.replies([messages[:-1] for messages in asked], max_new_tokens=max_new_tokens)
        given += [
            Answer(messages[:-1], text_of(messages[-1]["content"]), reply)
            for messages, reply in zip(asked, said, strict=True)
        ]
        if progress is not None:
            progress(len(batch))
    return given


def askable(llm: LLM, conversation: Conversation, tally: Tally) -> bool:
    """Whether a model can be asked for the last reply; if not, the tally is told why."""
    try:
        length = llm.prompt_length(conversation.with_whole_paths[:-1])
    except NotInstalled:  # of which none of them is to blame
        raise
    except ValueError as error:
        tally.add(Skipped(f"{conversation.where}: {error}", "that can't be asked"))
        return False
    if length >= llm.config.ctx_len:
        tally.add(Skipped(conversation.where, f"longer than ctx_len {llm.config.ctx_len}"))
        return False
    return True


def share(some: Iterable[Answer]) -> float:
    """The share of exact answers."""
    exact = [answer.exact for answer in some]
    return sum(exact) / len(exact)


def by_question(some: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers by the words of their question."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in some:
        groups[answer.words].append(answer)
    return dict(groups)
