"""`thinker generate MODEL [PROMPT]`: continue a text. Only the text goes to stdout, as it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint.files import to_json
from ..generate import Generation
from ..llm import LLM, Backend, DType, load
from .flags import Flag, Maybe, Texts


class Options(BaseModel):
    """Continue a text. Without PROMPT it is read from stdin, less a last newline; a terminal there means no prompt."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    # Several, since an optional one would read the prompt None as none at all.
    prompt: Annotated[Texts, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = Field(
        [], description="the text to continue; put -- in front of one that begins with a dash"
    )
    attach: Annotated[Texts, tyro.conf.UseAppendAction] = Field(
        [], description="a picture or a sound, in order of appearance; then the prompt is asked as a message"
    )
    max_new_tokens: int = Field(64, description="length of the continuation")
    temperature: float = Field(0.0, description="0 always takes the likeliest token; 1 draws as the model predicts")
    top_k: int = Field(0, description="draw among the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, description="draw among the likeliest tokens that make up this probability; 1 is off")
    min_p: float = Field(0.0, description="leave out tokens less likely than this share of the likeliest; 0 is off")
    repetition_penalty: float = Field(1.0, description="above 1 makes tokens that were there less likely; 1 is off")
    seed: int = Field(0, description="of the draws: the same seed writes the same text")
    stop: Annotated[Texts, tyro.conf.UseAppendAction] = Field([], description="end before this text")
    ignore_eos: Annotated[bool, Flag] = Field(False, description="go on after the end of the document")
    echo: Annotated[bool, Flag] = Field(False, description="put the prompt in front")
    ctx_len: Maybe[int] = Field(None, description="longest text in tokens; unset means the model's own")
    backend: Backend = Field("auto", description="native kernels, or torch; auto: native where it works")
    dtype: Maybe[DType] = Field(None, description="unset means int8 for a quantised file, else float32")
    as_json: Annotated[bool, Flag, tyro.conf.arg(name="json")] = Field(False, description="report as JSON")


def run(options: Options) -> int:
    """Write the text to stdout and everything else to stderr."""
    prompt = read_prompt(options.prompt)
    llm = load(options.model, options.backend, options.dtype, options.ctx_len, slots=1, notice=notice)
    pieces = llm.pieces(
        [prompt],
        echo=options.echo,
        attach=options.attach,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )
    for piece in pieces:
        if not options.as_json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        elif piece.result is not None:
            print(to_json(report(llm, piece.result)))
    if sys.stdout.isatty() and not options.as_json:
        print()
    return 0


def read_prompt(given: Sequence[str]) -> str:
    """The prompt from the command line, else from a pipe. Raises `ValueError` for several, and for what is no UTF-8."""
    if len(given) > 1:
        raise ValueError(f"{len(given)} prompts, the second is {given[1]!r}: put quotes around the whole prompt")
    if given:
        return given[0]
    if sys.stdin.isatty():
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not UTF-8 at byte {error.start}: convert the text first") from None
    return text.removesuffix("\n").removesuffix("\r")


def notice(message: str) -> None:
    """What a person should know, as one line on stderr."""
    print(f"thinker: {message}", file=sys.stderr)


def report(llm: LLM, result: Generation) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "model": str(llm.files.path),
        "decoder": type(llm.decoder).__name__,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "context_full": result.context_full,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.tokens),
        "prefill_seconds": round(result.prefill_seconds, 6),
        "decode_seconds": round(result.decode_seconds, 6),
        "tokens_per_second": round(result.tokens_per_second, 1),
    }
