"""`thinker chat MODEL`: talk to a model. Replies go to stdout as they come, everything else to stderr.

From a pipe every line is a message, and a mistake ends the command; on a terminal it is told and the talk goes on. What
the model remembers is in `conversation.py`, typing in `lines.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ..bench.limits import peak_memory
from ..llm import Backend, DType, load
from ..llm import Options as Writing
from .conversation import Conversation
from .flags import Maybe, Texts
from .generate import notice
from .lines import Entry, read_entry, typed_lines

HINT = "/reset begins anew, /quit (or Ctrl-D) leaves, Ctrl-C stops a reply, /help tells more"
HELP = """\
/attach FILE    show a picture or play a sound with the next message
/reset          begin anew; the system message stays
/system TEXT    tell the model what to be; without TEXT take that away
/save FILE      add the conversation to FILE, as a line that thinker train --chat reads
/help           this
/quit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next; so does what stands between \"\"\" and \"\"\". Ctrl-C stops a reply."""


class Options(BaseModel):
    """Talk to a model. /help tells what else can be typed; Ctrl-C stops a reply."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    system: str = Field("", description="what the model is told before the conversation")
    attach: Annotated[Texts, tyro.conf.UseAppendAction] = Field(
        [], description="a picture or a sound that goes with the first message"
    )
    max_new_tokens: int = Field(512, description="longest reply")
    temperature: float = Field(0.7, description="0 always takes the likeliest token; 1 draws as the model predicts")
    top_k: int = Field(0, description="draw among the k likeliest tokens; 0 is off")
    top_p: float = Field(0.95, description="draw among the likeliest tokens that make up this probability; 1 is off")
    min_p: float = Field(0.0, description="leave out tokens less likely than this share of the likeliest; 0 is off")
    repetition_penalty: float = Field(1.0, description="above 1 makes tokens that were there less likely; 1 is off")
    seed: int = Field(0, description="of the draws: the same seed and conversation give the same reply")
    ctx_len: Maybe[int] = Field(None, description="longest conversation in tokens; unset means the model's own")
    backend: Backend = Field("auto", description="native kernels, or torch; auto: native where it works")
    dtype: Maybe[DType] = Field(None, description="unset means int8 for a quantised file, else float32")


def run(options: Options) -> int:
    """Read messages until the end, and reply to each."""
    llm = load(options.model, options.backend, options.dtype, options.ctx_len, slots=1, notice=notice)
    writing = Writing(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    # Both complain before the first line is typed; the reply is asked for, and not begun.
    conversation = Conversation(llm, writing, notice, options.system)
    llm.stream_chat([{"role": "user", "content": ""}], **writing)
    for file in options.attach:
        conversation.attach(Path(file))
    interactive = sys.stdin.isatty()
    if interactive:
        print(HINT, file=sys.stderr)
    with typed_lines(interactive) as ask:
        while True:
            try:
                entry = read_entry(ask)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print(f"\n{HINT}", file=sys.stderr)  # a moment late for the reply, it would end the conversation
                continue
            if entry is None or entry.command == "/quit":
                break
            try:
                if entry.is_command:
                    obey(entry, conversation, interactive)
                elif entry.text.strip():
                    answer(entry.text, conversation, interactive)
            except ValueError as error:
                if not interactive:
                    raise
                notice(f"{error} (/help tells what can be typed)")
    if interactive:
        notice(f"{peak_memory() / 1e6:,.0f} MB of memory at the peak")
    return 0


def obey(entry: Entry, conversation: Conversation, interactive: bool) -> None:
    """Do what a command says. Raises `ValueError` for what can't be done."""
    command, argument = entry.command, entry.text.partition(" ")[2].strip()
    done = ""
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        conversation.reset()
        done = "a new conversation"
    elif command == "/system":
        conversation.tell(argument)
        done = "from here on the model is told so" if argument else "the model is told nothing from here on"
    elif command == "/attach":
        if not argument:
            raise ValueError("/attach needs the name of a file")
        conversation.attach(Path(argument))
        done = f"{argument} goes with the next message"
    elif command == "/save":
        if not argument:
            raise ValueError("/save needs the name of a file")
        exchanges = conversation.save(Path(argument))
        done = f"added {exchanges} exchange{'s' * (exchanges > 1)} as one line to {argument}"
    else:
        raise ValueError(f"{command} is no command: there are /attach, /reset, /system, /save, /help and /quit")
    if done and interactive:
        notice(done)


def answer(text: str, conversation: Conversation, interactive: bool) -> None:
    """Show the reply as it comes, as far as it gets."""
    reply = conversation.ask(text)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    finally:
        reply.close()
    print()
