"""Messages to token ids and back: chat templates in Jinja, rendered in a sandbox.

Only the template's own scaffolding becomes control tokens; what people wrote stays text, even if it reads `<|end|>`.
The trouble is that a template may trim, cut or rearrange contents, so their place in the result is unknown. Therefore
every control token's name inside a content is broken by a character that occurs nowhere else; names that are whole
after rendering are the template's, and the character is taken out again before the text between them is encoded.
A picture or a sound is a part of a content; one more such character stands for it, and becomes its three tokens.
Neither decoding nor stop conditions live here, nor what is in a picture: that is `modality/`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from .messages import Message, check_messages, media_parts, parts_of, text_of
from .tokenizer import ASSISTANT, END, MEDIA, SYSTEM, USER, Tokenizer

MEDIA_TOKENS = {"image": MEDIA[:3], "audio": MEDIA[3:]}  # begin, placeholder, end
MOST_TURNS = 1_000_000  # of all of a template's loops over numbers in one rendering, and of a text repeated
ROLE_TOKENS = frozenset({SYSTEM, USER, ASSISTANT, END})  # what the default template needs of a tokenizer

# What this project's own models speak: <|bos|><|user|>Hello<|end|><|assistant|>Hi<|end|>
DEFAULT_TEMPLATE = (
    f"{{%- set names = {{'system': '{SYSTEM}', 'user': '{USER}', 'assistant': '{ASSISTANT}'}} -%}}\n"
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "{%- if message.role not in names -%}\n"
    "{{- raise_exception('the role ' + message.role + ' is unknown: use system, user or assistant') -}}\n"
    "{%- endif -%}\n"
    f"{{{{- names[message.role] + message.content + '{END}' -}}}}\n"
    "{%- endfor -%}\n"
    f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}\n"
)


class ChatFormat:
    """How a model wants conversations written: its template, over its tokenizer.

    `bos_id` and `eos_id` are what the template calls bos_token and eos_token, by default the tokenizer's. bos comes
    from the template alone and is never added here. Raises `ValueError` for a template that is no valid Jinja.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = DEFAULT_TEMPLATE,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        self.tokenizer, self.source = tokenizer, template
        self._template = _compile(template)
        self._ids = {_name(tokenizer, id): id for id in tokenizer.control_ids}
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
        eos_id = tokenizer.eos_id if eos_id is None else eos_id
        self.bos_token = "" if bos_id is None else _name(tokenizer, bos_id)
        self.eos_token = "" if eos_id is None else _name(tokenizer, eos_id)
        # Of names that begin alike the longest counts, as with any tokenizer.
        self._names = "|".join(re.escape(name) for name in sorted(self._ids, key=len, reverse=True)) or r"(?!)"

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, with the beginning of the assistant's turn behind it.

        Raises `ValueError` for messages that are none, and for conversations that the template refuses.
        """
        guarded, marks = self._guard(messages)
        text = self._render(guarded, add_generation_prompt)
        self._check_controls(text, guarded, marks, add_generation_prompt)
        return self._encode(text, marks)

    def encode_for_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and for each whether it is the assistant's to say.

        Of the scaffolding that is the token that ends its turn, nothing else. Raises `ValueError` as `encode` does, and
        for a template that writes a turn in another way once others follow.
        """
        guarded, marks = self._guard(messages)
        text = self._render(guarded, add_generation_prompt=False)
        self._check_controls(text, guarded, marks, add_generation_prompt=False)
        ids: list[int] = []
        mask: list[bool] = []
        done = 0
        for place, message in enumerate(guarded):
            if message["role"] != "assistant":
                continue
            before = self._render(guarded[:place], add_generation_prompt=True)
            after = self._render(guarded[: place + 1], add_generation_prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"message {place + 1}: the chat template writes this turn in another way once others follow, "
                    "so which tokens are the assistant's can't be told"
                )
            # Encoded apart, since that is where generation will begin.
            prompt, reply = (
                self._encode(text[done : len(before)], marks),
                self._encode(text[len(before) : len(after)], marks),
            )
            end = max((i + 1 for i, id in enumerate(reply) if id in self.tokenizer.control_ids), default=len(reply))
            ids += prompt + reply
            mask += [False] * len(prompt) + [i < end for i in range(len(reply))]
            done = len(after)
        rest = self._encode(text[done:], marks)
        return ids + rest, mask + [False] * len(rest)

    @functools.cached_property
    def end_id(self) -> int | None:
        """The control token with which this template ends the assistant's turn, where it has one."""
        try:
            ids, mask = self.encode_for_training(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
            )
        except ValueError:  # a template of another kind of conversation
            return None
        last = next(id for id, said in zip(reversed(ids), reversed(mask), strict=True) if said)
        return last if last in self.tokenizer.control_ids else None

    def _guard(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], _Marks]:
        """The messages as texts, checked: control tokens' names broken behind their first character, media marked."""
        check_messages(messages)
        taken = {*self.source, *self._names, *(c for message in messages for c in text_of(message["content"]))}
        free = (c for c in map(chr, range(0xE000, 0x110000)) if c not in taken)
        marks = _Marks(next(free), {kind: next(free) for kind in MEDIA_TOKENS})
        for kind in {part["type"] for message in messages for part in media_parts(message["content"])}:
            if missing := [name for name in MEDIA_TOKENS[kind] if name not in self.tokenizer.special_ids]:
                raise ValueError(f"the tokenizer has no {missing[0]}, so a message can't hold {kind}")
        starts = re.compile(f"(?=(?:{self._names}))(.)", re.DOTALL)

        def content(message: Message) -> str:
            # Broken after joining: a name may be cut in two by the border of two parts.
            parts = parts_of(message["content"])
            whole = "".join(part["text"] if part["type"] == "text" else marks.media[part["type"]] for part in parts)
            return starts.sub(rf"\1{marks.breaks}", whole)

        return [{"role": message["role"], "content": content(message)} for message in messages], marks

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                range=_bounded_range(),
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except _Refusal as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None
        except Exception as error:  # a template is a program from elsewhere, and may raise whatever it likes
            raise ValueError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from None

    def _check_controls(
        self, text: str, guarded: Sequence[Message], marks: _Marks, add_generation_prompt: bool
    ) -> None:
        """`ValueError` if what people wrote had a say in the control tokens: the contents must not matter for them.

        Nor may the template lose, double or reorder a picture or a sound.
        """
        plain = [{**message, "content": "x" if message["content"].strip() else ""} for message in guarded]
        pattern = self._controls(marks)
        if pattern.findall(text) != pattern.findall(self._render(plain, add_generation_prompt)):
            raise ValueError(
                "the chat template makes control tokens out of what a message says, which is not supported"
            )
        media = re.compile(f"[{''.join(marks.media.values())}]")
        given, written = (media.findall(whole) for whole in ("".join(m["content"] for m in guarded), text))
        if given != written:
            raise ValueError(
                f"{len(given)} pictures and sounds are in the messages, and the chat template writes {len(written)}, "
                "or in another order"
            )

    def _controls(self, marks: _Marks) -> re.Pattern[str]:
        # A name of one character can't be broken inside: there the mark stands behind it.
        return re.compile(f"((?:{self._names})(?!{marks.breaks}))")

    def _encode(self, text: str, marks: _Marks) -> list[int]:
        return list(itertools.chain.from_iterable(self._pieces(text, marks)))

    def _pieces(self, text: str, marks: _Marks) -> Iterator[list[int]]:
        """The ids of each control token, each medium, and of the plain text between two of them."""
        kinds = {mark: kind for kind, mark in marks.media.items()}
        for place, piece in enumerate(self._controls(marks).split(text)):
            if place % 2:
                yield [self._ids[piece]]
                continue
            for part in re.split(f"([{''.join(kinds)}])", piece):
                if part in kinds:
                    yield [self.tokenizer.special_ids[name] for name in MEDIA_TOKENS[kinds[part]]]
                elif part:
                    yield self.tokenizer.encode(part.replace(marks.breaks, ""))


@dataclass(frozen=True)
class _Marks:
    """Characters that occur nowhere in a conversation: what breaks control names, and what stands for media."""

    breaks: str
    media: Mapping[str, str]


def _name(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes(id).decode("utf-8", "replace")


# The dialect of Jinja in which chat templates are written


class _Refusal(jinja2.TemplateError):
    """What a template raises by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which some templates mark the assistant's part: its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without attributes that Python itself gives a meaning."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product repeats nothing a million times.

    Nothing else is bounded but loops over numbers: padding, formats and texts that double can still fill the memory.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Numbers and short texts are multiplied."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        sizes = [value if isinstance(value, int) else len(value) for value in (left, right)] if not numbers else [0]
        if operator == "**" or math.prod(sizes) > MOST_TURNS:
            raise jinja2.exceptions.SecurityError(f"{operator} makes too much of what is before it")
        return super().call_binop(context, operator, left, right)


def _bounded_range() -> Callable[..., range]:
    """Jinja's `range` for one rendering, in which all of its loops together end."""
    left = MOST_TURNS

    def bounded(*arguments: int) -> range:
        nonlocal left
        made = safe_range(*arguments)
        left -= len(made)
        if left < 0:
            raise OverflowError(f"its loops take more than {MOST_TURNS:,} turns")
        return made

    return bounded


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't have the attribute {name!r}")


def _dict(**values: Any) -> dict[str, Any]:
    return values


def _raise(message: str) -> NoReturn:
    raise _Refusal(str(message))


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter would escape <, > and & for web pages.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.globals = {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict}
    environment.filters["tojson"] = _to_json
    return environment


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except Exception as error:  # Jinja makes Python of it, which has bounds of its own
        raise ValueError(f"the chat template can't be compiled: {type(error).__name__}: {error}") from None
