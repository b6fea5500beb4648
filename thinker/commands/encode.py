"""`thinker encode DATA --using ENCODER --out FOLDER`: features of pictures and sounds, computed once, to train on.

ENCODER is a Thinker model with encoders, or a Python callable FILE.py:NAME or MODULE:NAME, which is given a file's path
and returns n × width numbers. FOLDER gets one .npy file for each picture or sound, and the conversations as data.jsonl,
which `thinker train --chat --data FOLDER/data.jsonl` takes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import track

from ..data.chats import Skipped, counted, listed, open_chats
from ..messages import parts_of
from ..modality.media import Medium, check_features, medium_of
from ..modality.settings import Kind, NotInstalled
from .flags import Flag
from .generate import notice

Encode = Callable[[Medium], np.ndarray]


class Options(BaseModel):
    """Compute the features of pictures and sounds in conversations once, for training on them."""

    model_config = ConfigDict(extra="forbid")

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA …")] = Field(
        description="named sets, .jsonl files of conversations, or folders of such", min_length=1
    )
    using: str = Field(description="a Thinker model with encoders, or FILE.py:NAME or MODULE:NAME, a callable")
    out: Path = Field(description="the folder to write")
    kind: tuple[Kind, ...] = Field(("image", "audio"), description="what to encode; the rest stays as it is")
    strict_media: Annotated[bool, Flag] = Field(False, description="end at the first file that can't be used")


def run(options: Options) -> int:
    """Write features and conversations; a file that can't be used is counted, and its conversations left out."""
    if (options.out / "data.jsonl").exists():
        raise ValueError(f"{options.out / 'data.jsonl'} exists: choose another folder with --out")
    encode = encoder(options.using)
    conversations = [item[1] for item in open_chats(options.data).sides() if not isinstance(item, Skipped)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{options.out}: {error.strerror}: choose another folder with --out") from None
    unfinished = options.out / "data.jsonl.part"
    names: dict[str, str] = {}
    left_out: list[str] = []
    console = Console(stderr=True)
    with unfinished.open("w", encoding="utf-8") as file:
        for one in track(conversations, "encoding", console=console, transient=True):
            try:
                row = {"messages": [encoded(m, options, encode, names) for m in one.with_whole_paths]}
            except NotInstalled:
                raise
            except ValueError as error:
                if options.strict_media:
                    raise ValueError(f"{one.where}: {error}") from None
                left_out.append(f"{one.where}: {error}")
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if left_out:
        notice(f"left out {counted(len(left_out), 'conversation')}: {listed(left_out)}")
    if not names:
        raise ValueError(f"{', '.join(options.data)}: no {' and no '.join(options.kind)} could be encoded")
    unfinished.replace(options.out / "data.jsonl")
    print(f"{options.out}/data.jsonl: features of {len(names):,} files", file=sys.stderr)
    return 0


def encoded(message: Any, options: Options, encode: Encode, names: dict[str, str]) -> Any:
    """A message whose pictures and sounds are features in files; `names` has those that were written already."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in parts_of(message["content"]):
        if part["type"] not in options.kind:
            parts.append(part)
            continue
        medium = medium_of(part)
        if medium.key not in names:
            features = check_features(np.asarray(encode(medium)), medium.name)
            name = f"{len(names):06d}.{medium.kind}.npy"
            np.save(options.out / name, features)
            names[medium.key] = name
        parts.append({"type": medium.kind, medium.kind: names[medium.key]})
    return {**message, "content": parts}


def encoder(using: str) -> Encode:
    """What turns a file into features. Raises `ValueError` for a model without encoders and for what is no callable."""
    place, colon, name = using.rpartition(":")
    if not colon or Path(using).exists():
        return model_encoder(using)
    function = getattr(module_of(place), name, None)
    if not callable(function):
        raise ValueError(f"{using}: {place} has no function {name}")

    def encode(medium: Medium) -> np.ndarray:
        if medium.path is None:
            raise ValueError(f"{medium.name}: a callable is given files: save the data URI as one")
        medium.open().close()
        try:
            return np.asarray(function(str(medium.path)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{medium.name}: {error}") from None

    return encode


def model_encoder(path: str) -> Encode:
    """The encoders of a Thinker model, without its projectors."""
    import torch

    from ..llm import load

    senses = load(path, notice=notice).reader.senses

    @torch.inference_mode()
    def encode(medium: Medium) -> np.ndarray:
        return senses.of(medium.kind).encode([medium.prepared(senses.config)]).float().numpy()

    return encode


def module_of(place: str) -> Any:
    """A module by its name or its file. Raises `ValueError` where there is none."""
    path = Path(place)
    if path.suffix != ".py":
        if place.startswith("."):
            raise ValueError(f"{place}: is relative to nothing: give the module's whole name, or FILE.py")
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"{place}: can't be imported ({error})") from None
    spec = importlib.util.spec_from_file_location(f"encoder {path.stem}", path)  # never the name of another module
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path}: no such file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{path}: needs what is not installed ({error})") from None
    return module
