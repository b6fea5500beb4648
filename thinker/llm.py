"""`load(path)` and what it returns: a model that generates, streams and chats, from any format.

Everything is opened when it is first used, so a folder without a tokenizer still has a `.model`, and native decoding
imports no torch. How texts come about is in `generate.py` and `chat.py`, formats are in `formats/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args, overload

from .config import ThinkerConfig
from .decode.decoder import Decoder
from .evaluate import Evaluation, Progress, evaluate
from .formats import ModelFiles, open_model
from .generate import Engine, Generation, Piece, Request
from .messages import Message, check_messages, media_parts, text_of
from .places import cache_folder
from .sampling import Sampling
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .attachments import Attachable, Reader
    from .chat import ChatFormat
    from .model import ThinkerLM

Backend = Literal["auto", "native", "torch"]
NativeType = Literal["float32", "int8"]
TorchType = Literal["float32", "bfloat16", "float16", "float64"]
DType = Literal["float32", "int8", "bfloat16", "float16", "float64"]
Notice = Callable[[str], None]

SLOTS = 8  # texts at once, if their keys and values fit into this many bytes; memory is taken for those in use
SLOT_BYTES = 1 << 30


class Options(TypedDict, total=False):
    """How a text is written: its length, the settings of `Sampling`, and what ends it."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    penalize_prompt: bool
    temperature_last: bool
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def load(
    path: str | Path,
    backend: Backend = "auto",
    dtype: DType | None = None,
    ctx_len: int | None = None,
    slots: int | None = None,
    notice: Notice = _warn,
) -> LLM:
    """Open a Thinker directory, a Hugging Face folder or a GGUF file.

    backend: native kernels for this processor, or torch; auto takes native where it works. dtype: float32 or int8 run
    natively, float32, bfloat16, float16 and float64 in torch; unset means int8 for a quantised file, else float32.
    ctx_len replaces the model's own. slots: how many texts run at once, by default up to 8. notice gets what a person
    should know, one line at a time. Raises `ValueError` for what can't be opened.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}: choose among {', '.join(get_args(Backend))}")
    types = {"native": get_args(NativeType), "torch": get_args(TorchType), "auto": get_args(DType)}[backend]
    if dtype is not None and dtype not in types:
        raise ValueError(f"dtype is {dtype!r}: with backend {backend} choose among {', '.join(types)}")
    if slots is not None and slots < 1:
        raise ValueError(f"slots is {slots}: at least 1 is needed")
    files = open_model(path)
    if ctx_len is not None:
        files = _with_context(files, ctx_len, notice)
    if slots is None:
        slots = max(min(SLOTS, SLOT_BYTES // slot_bytes(files.config)), 1)
    return LLM(files, backend, dtype, slots, notice)


def slot_bytes(config: ThinkerConfig) -> int:
    """What one text of full length takes in keys and values, in float32."""
    return 2 * config.n_layers * config.n_kv_heads * config.ctx_len * config.head_width * 4


def _with_context(files: ModelFiles, ctx_len: int, notice: Notice) -> ModelFiles:
    trained = files.config.ctx_len
    if ctx_len < 1:
        raise ValueError(f"ctx_len is {ctx_len}: at least 1 is needed, and the model was trained on {trained}")
    if ctx_len > trained:
        notice(
            f"ctx_len {ctx_len} is more than the {trained} that {files.path} was trained on: beyond, expect nonsense"
        )
    return dataclasses.replace(files, config=files.config.changed(ctx_len=ctx_len))


def holds_media(messages: Sequence[Message]) -> bool:
    """Whether there is a picture or a sound in a conversation. Raises `ValueError` for messages that are none."""
    check_messages(messages)
    return any(media_parts(message["content"]) for message in messages)


class LLM:
    """A model with its tokenizer. Made by `load`. Threads that share it take turns, and end each other's texts."""

    def __init__(self, files: ModelFiles, backend: Backend, dtype: DType | None, slots: int, notice: Notice) -> None:
        self.files = files
        self._backend, self._dtype, self._slots, self._notice = backend, dtype, slots, notice
        self._told: set[str] = set()

    @property
    def config(self) -> ThinkerConfig:
        """The architecture."""
        return self.files.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own. Raises `ValueError` when it has none."""
        if self.files.tokenizer_json is None:
            raise ValueError(f"{self.files.path}: has no tokenizer.json, without which texts can't be read or written")
        try:
            return Tokenizer.from_json(self.files.tokenizer_json)
        except ValueError as error:
            raise ValueError(f"{self.files.path}: its tokenizer can't be used: {error}") from None

    @functools.cached_property
    def model(self) -> ThinkerLM:
        """The network in torch, in eval mode; on an accelerator if there is one and texts are computed in torch."""
        import torch

        from .model import ThinkerLM
        from .parameters import load_parameters

        with torch.inference_mode(False):  # whatever the first call stands in
            model = ThinkerLM(self.config)
            load_parameters(model, self.files.tensors, str(self.files.path))
        dtype = "float32" if self._dtype in (None, "int8") else self._dtype
        device = "cuda" if self._in_torch and torch.cuda.is_available() else "cpu"
        return model.to(device, getattr(torch, str(dtype))).eval()

    @property
    def _in_torch(self) -> bool:
        """Whether native kernels aren't asked for, or were in vain."""
        return self._backend == "torch" or (self._dtype is not None and self._dtype not in get_args(NativeType))

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What computes the texts: native, or torch where that was chosen or native can't."""
        if self._native is not None:
            return self._native
        from .decode.torch_decoder import TorchDecoder

        return TorchDecoder(self.model, self._slots)

    @functools.cached_property
    def _native(self) -> Decoder | None:
        if self._in_torch:
            return None
        from .decode.native import NativeUnavailable, open_native
        from .decode.native.kernels import ALL

        kept = True
        with contextlib.suppress(ImportError):  # of which `open_native` will say more
            kept = all(kernel.is_kept for kernel in ALL)
        if not kept and sys.stderr is not None and sys.stderr.isatty():
            print("compiling the kernels for this processor, some 10 seconds, once", file=sys.stderr)
        quantised = self.files.dtype not in get_args(TorchType)
        int8 = self._dtype == "int8" or (self._dtype is None and quantised)
        try:
            decoder = open_native(self.files, self._slots, "int8" if int8 else "float32")
        except NativeUnavailable as error:
            line = " ".join(str(error).split())
            if self._backend == "native" or self._dtype == "int8":
                raise ValueError(f"{line}: use backend torch, in another type than int8") from error
            self._notice(f"computing in torch: {line}")
            self._backend = "torch"  # from here on as if it had been chosen: on an accelerator, if there is one
            return None
        if not kept and not all(kernel.is_kept for kernel in ALL):
            self._notice(f"kernels can't be kept in {cache_folder()}, so every start compiles them: make room there")
        return decoder

    @functools.cached_property
    def engine(self) -> Engine:
        """The decoder's slots and what they hold."""
        return Engine(self.decoder, self.tokenizer)

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How conversations are written for this model. Raises `ValueError` when that is not known."""
        from .chat import DEFAULT_TEMPLATE, ROLE_TOKENS, ChatFormat

        template = self.files.chat_template
        if template is None:
            if not self.tokenizer.special_ids.keys() >= ROLE_TOKENS:
                raise ValueError(f"{self.files.path}: has no chat template, and its tokenizer no tokens for turns")
            template = DEFAULT_TEMPLATE
        eos_id = self.files.eos_ids[0] if self.files.eos_ids else None
        try:
            return ChatFormat(self.tokenizer, template, self.files.bos_id, eos_id)
        except ValueError as error:
            raise ValueError(f"{self.files.path}: {error}") from None

    @functools.cached_property
    def reader(self) -> Reader:
        """What turns pictures and sounds into the stream. Raises `ValueError` for a model without encoders."""
        if self.files.modality is None:
            raise ValueError(f"{self.files.path}: has no encoders, so it takes neither pictures nor sounds")
        from .attachments import Reader

        return Reader(self.files.modality, self.files.tensors["tok_emb.weight"], self.chat_format, str(self.files.path))

    # Speaking

    @overload
    def generate(
        self, prompt: str, echo: bool = False, attach: Sequence[Attachable] = (), **options: Unpack[Options]
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        echo: bool = False,
        attach: Sequence[Attachable] = (),
        **options: Unpack[Options],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        echo: bool = False,
        attach: Sequence[Attachable] = (),
        **options: Unpack[Options],
    ) -> str | list[str]:
        """The continuation of a prompt, or of several at once, without eos and stop string; `echo` puts it in front.

        With `attach`, files of pictures and sounds or parts of messages, every prompt is asked as a user's message, for
        from conversations a model learns to see: attachments in front, or where `<|image|>` and `<|audio|>` stand.

        Options and their defaults: max_new_tokens=64, temperature=0 (greedy), top_k=0, top_p=1, min_p=0,
        repetition_penalty=1, penalize_prompt=True, temperature_last=False, seed=0, stop=(), ignore_eos=False.
        The text of a prompt doesn't depend on the others; one that is given twice gets two texts.
        """
        if isinstance(prompt, str):
            return self.generations([prompt], echo, attach, **options)[0].text
        return [generation.text for generation in self.generations(prompt, echo, attach, **options)]

    def generations(
        self,
        prompts: list[str] | tuple[str, ...],
        echo: bool = False,
        attach: Sequence[Attachable] = (),
        **options: Unpack[Options],
    ) -> list[Generation]:
        """As `generate`, with why each text ended, counts and times."""
        pieces = self.pieces(prompts, echo, attach, **options)
        results = {piece.place: piece.result for piece in pieces if piece.result is not None}
        return [results[place] for place in range(len(prompts))]

    def stream(
        self, prompt: str, echo: bool = False, attach: Sequence[Attachable] = (), **options: Unpack[Options]
    ) -> Iterator[str]:
        """As `generate`, in pieces as they become certain; a character is never cut."""
        return (piece.text for piece in self.pieces([prompt], echo, attach, **options) if piece.text)

    def pieces(
        self,
        prompts: list[str] | tuple[str, ...],
        echo: bool = False,
        attach: Sequence[Attachable] = (),
        **options: Unpack[Options],
    ) -> Iterator[Piece]:
        """The texts of several prompts as they grow, each one's last piece with its `Generation`."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is {prompts!r}: give a list of texts")
        seen: Counter[str] = Counter()
        requests = []
        for prompt in prompts:
            if attach:
                from .attachments import question

                request = self._reply_to([question(prompt, attach)], **options)
            else:
                request = self._request({"tokens": self.encode(prompt)}, **options)
            requests.append(dataclasses.replace(request, number=seen[prompt], echo=prompt if echo else ""))
            seen[prompt] += 1
        return self._noticed(self.engine.run(requests))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        """The assistant's reply to a whole conversation; what it shares with the last call is not computed again.

        Options are those of `generate`; max_new_tokens is 256 by default.
        """
        return "".join(self.stream_chat(messages, **options))

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Iterator[str]:
        """As `chat`, in pieces."""
        options.setdefault("max_new_tokens", 256)
        request = self._reply_to(messages, **options)
        return (piece.text for piece in self._noticed(self.engine.run([request], reuse=True)) if piece.text)

    def replies(self, conversations: Sequence[Sequence[Message]], **options: Unpack[Options]) -> list[str]:
        """The replies to several conversations, as many at a time as there are slots."""
        requests = [self._reply_to(messages, **options) for messages in conversations]
        results = {piece.place: piece.result for piece in self.engine.run(requests) if piece.result is not None}
        return [results[place].text for place in range(len(requests))]

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many positions of the context a conversation takes before the reply."""
        return self.reader.length(messages) if holds_media(messages) else len(self.chat_format.encode(messages))

    def evaluate(
        self,
        documents: Iterable[str | Iterable[str]],
        stride: int | None = None,
        batch: int = 8,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Loss, perplexity and bits per byte of texts, computed as the model speaks: see `evaluate.evaluate`."""
        settings = self.tokenizer, documents, stride, batch, progress, self.files.bos_id
        if self._native is None:
            return evaluate(self.model, *settings)
        with self.engine.lend():
            return evaluate(self._native, *settings)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """A prompt's ids, with bos once in front if the model wants it, or if there would be none at all."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {prompt!r}: give a text")
        ids, bos_id = self.tokenizer.encode(prompt), self.files.bos_id
        self._notice_left_out(prompt)
        begins = bos_id is not None and (self.files.add_bos or not ids)
        return (bos_id, *ids) if begins and bos_id is not None else tuple(ids)

    def _reply_to(self, messages: Sequence[Message], **options: Unpack[Options]) -> Request:
        """The request for the assistant's reply; the end of its turn ends it."""
        if holds_media(messages):
            embeddings, stands_for = self.reader.prompt(messages)
            request = self._request({"embeddings": embeddings, "stands_for": stands_for}, **options)
        else:
            request = self._request({"tokens": tuple(self.chat_format.encode(messages))}, **options)
        for message in messages:
            self._notice_left_out(text_of(message["content"]))
        end = self.chat_format.end_id
        if end is not None and not options.get("ignore_eos"):
            request = dataclasses.replace(request, eos_ids=request.eos_ids | {end})
        return request

    def _request(
        self,
        prompt: dict[str, Any],
        *,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: float,
    ) -> Request:
        return Request(
            **prompt,
            sampling=Sampling(**sampling),  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            eos_ids=frozenset() if ignore_eos else frozenset(self.files.eos_ids),
        )

    def _notice_left_out(self, text: str) -> None:
        """Say once of each character that the model does not see it."""
        for character in self.tokenizer.left_out(text):
            if character not in self._told:
                self._told.add(character)
                self._notice(f"{self.files.path}: its tokenizer has no tokens for {character!r}: it is left out")

    def _noticed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            yield piece
            if piece.result is not None and piece.result.context_full:
                full = f"{piece.result.prompt_tokens} + {len(piece.result.tokens)} tokens"
                self._notice(f"a text ended because {full} fill ctx_len {self.config.ctx_len}")
