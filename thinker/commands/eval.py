"""`thinker eval MODEL --data NAME|PATH …`: bits per byte of texts, or with --chat how many replies are exact."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import Progress

from ..checkpoint.files import to_json
from ..data.chats import Tally
from ..data.progress import byte_bar
from ..data.sources import open_evaluation
from ..evaluate import Evaluation
from ..llm import LLM, Backend, DType, load
from .flags import Flag
from .generate import notice

QUESTIONS_SHOWN = 6


class Options(BaseModel):
    """How well a model predicts texts. Of a named set the held-out part is read, of a file or folder the whole."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    data: tuple[str, ...] = Field(min_length=1, description="named sets, files, folders or hub ids; each is reported")
    chat: Annotated[bool, Flag] = Field(False, description="data are conversations: how many replies are exactly right")
    stride: int | None = Field(None, description="tokens by which the window moves on; unset means half the context")
    batch: int = Field(8, ge=1, description="windows that torch computes at once")
    ctx_len: int | None = Field(None, description="longest window in tokens; unset means the model's own")
    backend: Backend = Field("auto", description="native kernels, or torch; auto: native where it works")
    dtype: DType | None = Field(None, description="unset means int8 for a quantised file, else float32")
    compare: DType | None = Field(None, description="evaluate in this type as well, and show the difference")
    as_json: Annotated[bool, Flag, tyro.conf.arg(name="json")] = Field(False, description="report as JSON")


def run(options: Options) -> int:
    """Evaluate one text after the other and print what came out on stdout."""
    if options.chat:
        return run_chats(options)
    texts = {name: list(open_evaluation(name)) for name in options.data}
    models = [load(options.model, options.backend, options.dtype, options.ctx_len, slots=1, notice=notice)]
    if options.compare is not None:
        models.append(load(options.model, options.backend, options.compare, options.ctx_len, slots=1, notice=notice))
    rows = []
    for llm in models:
        for name, documents in texts.items():
            with byte_bar(f"evaluating on {name}", sum(document.size for document in documents)) as progress:
                pieces = (document.read() for document in documents)
                result = llm.evaluate(pieces, options.stride, options.batch, progress)
                rows.append(Row(name, llm.decoder.dtype, llm.decoder.weight_bytes, result))
    print(as_json(models[0], options, rows) if options.as_json else as_table(rows))
    return 0


def run_chats(options: Options) -> int:
    """Ask everything that is held out and print the shares of exact replies."""
    from ..answers import answers, by_question, conversations_of, share

    for name in ("stride", "batch", "compare"):
        if name in options.model_fields_set:
            raise ValueError(f"{name} is for texts: drop it with --chat")
    tally = Tally()
    asked = {name: conversations_of(name, tally) for name in options.data}
    llm = load(options.model, options.backend, options.dtype, options.ctx_len, notice=notice)
    report: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=sum(map(len, asked.values())))
        for name, conversations in asked.items():
            given = answers(llm, conversations, progress=lambda count: bar.advance(task, count), tally=tally)
            if not given:
                continue
            kinds = by_question(given)
            report[name] = {"asked": len(given), "exact": share(given)}
            if 1 < len(kinds) <= QUESTIONS_SHOWN:
                report[name]["by_question"] = {words: share(some) for words, some in kinds.items()}
    for line in tally.lines():
        notice(line)
    if not report:
        raise ValueError(f"{', '.join(asked)}: no conversation is left to be asked: give others, or a larger --ctx-len")
    if options.as_json:
        print(to_json({"model": str(llm.files.path), "exact_match": report}))
        return 0
    width = max(map(len, report))
    for name, row in report.items():
        parts = ", ".join(f"{words} {value:.1%}" for words, value in row.get("by_question", {}).items())
        print(
            f"{name:{width}}  {row['exact']:6.1%} of {row['asked']:,} exactly right"
            + (f"   ({parts})" if parts else "")
        )
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One text under one number type."""

    data: str
    dtype: str
    weight_bytes: int
    result: Evaluation


def as_table(rows: list[Row]) -> str:
    """One line a text and number type, under a heading; further types also with their change of loss."""
    width = max(len("data"), *(len(row.data) for row in rows))
    lines = [f"{'data':{width}}  dtype     weights    bits/byte    loss  perplexity      tokens       bytes  tokens/s"]
    first = {row.data: row.result.loss for row in reversed(rows)}
    for row in rows:
        one = row.result
        change = 100 * (one.loss / first[row.data] - 1)
        lines.append(
            f"{row.data:{width}}  {row.dtype:8} {row.weight_bytes / 1e6:6,.1f} MB  {one.bits_per_byte:9.4f}"
            f"  {one.loss:6.4f}  {one.perplexity:10.2f}  {one.tokens:10,}  {one.bytes:10,}"
            f"  {one.tokens / one.seconds:8,.0f}" + (f"  loss {change:+.3f} %" if row.dtype != rows[0].dtype else "")
        )
    return "\n".join(lines)


def as_json(llm: LLM, options: Options, rows: list[Row]) -> str:
    """What `--json` prints."""
    results = [
        {"data": row.data, "dtype": row.dtype, "weight_bytes": row.weight_bytes, **dataclasses.asdict(row.result)}
        for row in rows
    ]
    about = {"model": str(llm.files.path), "ctx_len": llm.config.ctx_len, "stride": options.stride}
    return to_json(about | {"results": results})
