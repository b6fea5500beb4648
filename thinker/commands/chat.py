"""`thinker chat MODEL`: talk to a model, line by line. Replies go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ..llm import LLM, Backend, DType, load
from .generate import notice

HELP = "/reset begins anew, /quit (or Ctrl-D) leaves, Ctrl-C stops a reply"


class Options(BaseModel):
    """Talk to a model. /reset begins anew, /quit leaves, Ctrl-C stops a reply."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    system: str = Field("", description="what the model is told before the conversation")
    max_new_tokens: int = Field(512, description="longest reply")
    temperature: float = Field(0.7, description="0 always takes the likeliest token; 1 draws as the model predicts")
    top_k: int = Field(0, description="draw among the k likeliest tokens; 0 is off")
    top_p: float = Field(0.95, description="draw among the likeliest tokens that make up this probability; 1 is off")
    min_p: float = Field(0.0, description="leave out tokens less likely than this share of the likeliest; 0 is off")
    repetition_penalty: float = Field(1.0, description="above 1 makes tokens that were there less likely; 1 is off")
    seed: int = Field(0, description="of the draws: the same seed and conversation give the same reply")
    ctx_len: int | None = Field(None, description="longest conversation in tokens; unset means the model's own")
    backend: Backend = Field("auto", description="native kernels, or torch; auto: native where it works")
    dtype: DType | None = Field(None, description="unset means int8 for a quantised file, else float32")


def run(options: Options) -> int:
    """Read lines until the end, and reply to each."""
    llm = load(options.model, options.backend, options.dtype, options.ctx_len, slots=1, notice=notice)
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(beginning)
    llm.chat_format.encode([*messages, {"role": "user", "content": ""}])  # complain before the first line is typed
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (input() then edits lines and remembers them)

        print(HELP, file=sys.stderr)
    while (line := read_line(interactive)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
        elif line.startswith("/"):
            notice(f"{line.split()[0]} is unknown: {HELP}")
        elif line.strip():
            messages = answer(llm, options, [*messages, {"role": "user", "content": line}], interactive)
    return 0


def read_line(interactive: bool) -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None


def answer(llm: LLM, options: Options, messages: list[dict[str, str]], interactive: bool) -> list[dict[str, str]]:
    """Stream the reply, as far as it gets; the conversation to go on with."""
    said: list[str] = []
    try:
        stream = llm.stream_chat(
            messages,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        for text in stream:
            said.append(text)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except ValueError as error:  # such as a conversation that has grown too long
        if not interactive:
            raise
        notice(f"{error} (/reset begins anew)")
        return messages[:-1]
    print()
    return [*messages, {"role": "assistant", "content": "".join(said)}]
