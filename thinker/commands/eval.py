"""`thinker eval MODEL --data NAME|PATH …`: loss, perplexity and bits per byte of texts."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ..data.progress import byte_bar
from ..data.sources import open_evaluation
from ..evaluate import Evaluation
from ..llm import LLM, Backend, DType, load
from .generate import Flag, notice


class Options(BaseModel):
    """How well a model predicts texts. Of a named set the held-out part is read, of a file or folder the whole."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    data: tuple[str, ...] = Field(min_length=1, description="named sets, files, folders or hub ids; each is reported")
    stride: int | None = Field(None, description="tokens by which the window moves on; unset means half the context")
    batch: int = Field(8, ge=1, description="windows that torch computes at once")
    ctx_len: int | None = Field(None, description="longest window in tokens; unset means the model's own")
    backend: Backend = Field("auto", description="native kernels, or torch; auto: native where it works")
    dtype: DType | None = Field(None, description="unset means int8 for a quantised file, else float32")
    as_json: Annotated[bool, Flag, tyro.conf.arg(name="json")] = Field(False, description="report as JSON")


def run(options: Options) -> int:
    """Evaluate one text after the other and print what came out on stdout."""
    texts = {name: list(open_evaluation(name)) for name in options.data}
    llm = load(options.model, options.backend, options.dtype, options.ctx_len, slots=1, notice=notice)
    results = {}
    for name, documents in texts.items():
        with byte_bar(f"evaluating on {name}", sum(document.size for document in documents)) as progress:
            pieces = (document.read() for document in documents)
            results[name] = llm.evaluate(pieces, options.stride, options.batch, progress)
    print(as_json(llm, options, results) if options.as_json else as_table(results))
    return 0


def as_table(results: dict[str, Evaluation]) -> str:
    """One line a text, under a heading."""
    width = max(len("data"), *(len(name) for name in results))
    lines = [f"{'data':{width}}  bits/byte    loss  perplexity      tokens       bytes  tokens/s"]
    lines += [
        f"{name:{width}}  {one.bits_per_byte:9.4f}  {one.loss:6.4f}  {one.perplexity:10.2f}"
        f"  {one.tokens:10,}  {one.bytes:10,}  {one.tokens / one.seconds:8,.0f}"
        for name, one in results.items()
    ]
    return "\n".join(lines)


def as_json(llm: LLM, options: Options, results: dict[str, Evaluation]) -> str:
    """What `--json` prints."""
    return json.dumps(
        {
            "model": str(llm.files.path),
            "ctx_len": llm.config.ctx_len,
            "stride": options.stride,
            "results": [{"data": name, **dataclasses.asdict(one)} for name, one in results.items()],
        },
        ensure_ascii=False,
        indent=2,
    )
