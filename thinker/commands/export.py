"""`thinker export MODEL OUT.gguf`: a file for llama.cpp, checked against the model when llama-cpp-python is there."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from ..certificate import find_truth, load_short, some_tokens, verify_gguf
from ..formats.gguf_export import ExportType, export_gguf
from .doctor import show
from .flags import Flag
from .generate import notice


class Options(BaseModel):
    """Write a GGUF file with weights, tokenizer and chat template."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a Thinker directory, a Hugging Face folder, or a .gguf file"
    )
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.gguf")] = Field(description="the file")
    type: ExportType = Field("f16", description="how weights are stored; norms and routers stay in float32")
    text_only: Annotated[bool, Flag] = Field(False, description="leave out encoders of pictures and sound, if any")
    force: Annotated[bool, Flag] = Field(False, description="replace OUT.gguf if it exists")
    check: bool = Field(True, description="compare with llama.cpp afterwards, where llama-cpp-python is installed")


def run(options: Options) -> int:
    """Write the file, then check it; 1 when the check fails."""
    if options.out.suffix != ".gguf":
        raise ValueError(f"{options.out}: the file's name must end in .gguf")
    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder: name the file to write in it")
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} exists: choose another name, or replace it with --force")
    files, llm = load_short(options.model, notice)
    files = dataclasses.replace(files, modality=None) if options.text_only else files
    tokens = some_tokens(llm.config) if options.check else None
    with Console(stderr=True).status("exporting") as status:
        export_gguf(
            files,
            options.out,
            options.type,
            progress=lambda done, total: status.update(f"exporting: {done} of {total} tensors"),
        )
        print(f"{options.out}: {options.out.stat().st_size / 1e6:,.1f} MB, {options.type}", file=sys.stderr)
        if tokens is None:
            return 0
        if importlib.util.find_spec("llama_cpp") is None:
            notice("not checked against llama.cpp, since llama-cpp-python is not installed")
            return 0
        status.update("comparing with llama.cpp")
        checks = verify_gguf(options.out, llm, tokens, find_truth(llm, tokens), exact=options.type == "f32")
    show(f"{options.out} in llama.cpp", checks)
    return 1 if any(check.passed is False for check in checks) else 0
