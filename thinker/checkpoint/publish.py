"""The published view of a run: the Hugging Face folder at its top, made from the exact state and from nothing else.

Folding and casting happen here only. Each file is replaced atomically and carries its step, so that a kill in between
is seen, and repaired from `training/`. Foreign names are in `formats/`, the exact state in `training.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..config import ThinkerConfig
from ..formats.huggingface import expressible, open_tensors, to_huggingface
from ..formats.huggingface_config import disagreement, family_of, read_config, write_config
from ..formats.huggingface_tokenizer import put_bos_in_front, read_text_files, write_tokenizer_config
from ..formats.model_files import Modality, ModelFiles
from ..formats.tensors import LazyTensors
from .files import read_json, remove_leftovers, write_json, write_text
from .reader import read_safetensors, widen
from .training import TrainingState, best_step, latest, load, to_publish
from .writer import write_safetensors

STEP = "thinker_step"
WEIGHTS, CONFIG, GENERATION, OWN = "model.safetensors", "config.json", "generation_config.json", "thinker.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MODALITY, SENSES = "modality.safetensors", "modality.json"
VIEW = (WEIGHTS, CONFIG, GENERATION, OWN, TOKENIZER, TOKENIZER_CONFIG, MODALITY, SENSES)
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Publication:
    """What the view says beyond the weights; a run keeps it in its exact state under "publication"."""

    dtype: str = "float32"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} can't be published: choose {', '.join(DTYPES)}")
        if self.add_bos and self.bos_id is None:
            raise ValueError("add_bos needs a bos_id")

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"eos_ids": list(self.eos_ids)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Publication:
        """From JSON; unknown keys raise `ValueError`."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"{where}: publication has unknown keys {sorted(unknown)}")
        return cls(**{**values, "eos_ids": tuple(values.get("eos_ids", ()))})


def publish(run_dir: Path) -> Path:
    """Make the view from the best exact state of a run, or the newest, and return that state's folder.

    Weights of another program, which may be somebody's own training, are never replaced: `ValueError`.
    """
    path = to_publish(run_dir)
    if path is None:
        raise ValueError(f"{run_dir}: has no whole state in training/ to publish from")
    if (foreign := foreign_weights(run_dir)) is not None:
        raise ValueError(f"{foreign}: was not written by Thinker and stays: move it elsewhere to publish there")
    publish_state(run_dir, load(path))
    return path


def publish_state(folder: Path, state: TrainingState) -> None:
    """Make the view of one exact state."""
    publication = Publication.from_json(state.state.get("publication") or {}, str(state.path))
    modality = None
    if state.modality is not None:
        from ..modality.settings import SensesConfig

        modality = Modality(SensesConfig.from_mapping(state.state["senses"], str(state.path)), state.modality)
    write_view(folder, state.step, state.config, state.shown, publication, state.tokenizer_json, modality)


def write_view(
    folder: Path,
    step: int,
    config: ThinkerConfig,
    parameters: Mapping[str, np.ndarray],
    publication: Publication,
    tokenizer_json: str | None,
    modality: Modality | None = None,
) -> None:
    """Write every file of a view. NaN in the parameters and values beyond the dtype's range raise `ValueError`."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    config, tensors = fold_layer_scale(config, parameters, str(folder))
    dtype = publication.dtype
    ids = {
        "bos_token_id": publication.bos_id,
        "eos_token_id": _one_or_list(publication.eos_ids),
        "pad_token_id": publication.pad_id,
    }
    texts: dict[str, Any] = {}
    if tokenizer_json is not None:
        if publication.add_bos and publication.bos_id is not None:
            tokenizer_json = put_bos_in_front(tokenizer_json, publication.bos_id)
        texts = write_tokenizer_config(
            tokenizer_json,
            config.ctx_len,
            publication.bos_id,
            publication.eos_ids,
            publication.pad_id,
            publication.add_bos,
            publication.chat_template,
        )
    own = {
        STEP: step,
        "architecture": family_of(config).class_name,
        "only_thinker_because": expressible(config),
        "dtype": dtype,
        "config": json.loads(config.model_dump_json()),
        "senses": list(modality.config.kinds) if modality is not None else [],
    }
    # The weights come first and thinker.json last: whatever is replaced between them, a kill leaves two steps to see.
    metadata = {"format": "pt", "step": str(step)}
    write_safetensors(folder / WEIGHTS, to_huggingface(config, tensors, str(folder)), metadata, DTYPES[dtype])
    write_json(folder / CONFIG, write_config(config, dtype) | ids | {STEP: step})
    write_json(folder / GENERATION, ids | {STEP: step})
    if tokenizer_json is not None:
        write_text(folder / TOKENIZER, tokenizer_json)
        write_json(folder / TOKENIZER_CONFIG, texts | {STEP: step})
    if modality is not None:
        write_safetensors(folder / MODALITY, modality.tensors, metadata)
        write_json(folder / SENSES, modality.config.to_json() | {STEP: step})
    write_json(folder / OWN, own)


def fold_layer_scale(
    config: ThinkerConfig, parameters: Mapping[str, np.ndarray], where: str
) -> tuple[ThinkerConfig, Mapping[str, np.ndarray]]:
    """The same function without layer_scale: the scales multiply the rows of `out_proj` and `down_proj`."""
    if config.layer_scale is None:
        return config, parameters
    scale_of = {}
    for i in range(config.n_layers):
        block = f"blocks.{i}"
        scale_of[f"{block}.attn.out_proj.weight"] = f"{block}.scale1"
        scale_of[f"{block}.moe.experts.down_proj" if config.use_moe else f"{block}.mlp.down_proj.weight"] = (
            f"{block}.scale2"
        )
    scales = set(scale_of.values())

    def folded(name: str) -> np.ndarray:
        if name not in scale_of:
            return parameters[name]
        return widen(parameters[name]) * widen(parameters[scale_of[name]])[:, None]  # (…, D, F) by rows

    makers = {name: (lambda name=name: folded(name)) for name in parameters if name not in scales}
    return config.changed(layer_scale=None), LazyTensors(makers, where)


def repair(run_dir: Path) -> bool:
    """Publish again where a kill left a view in pieces, or behind the state to publish; whether that was necessary."""
    path = to_publish(run_dir)
    if path is None or (_inconsistency(run_dir) is None and not _lags(run_dir, path)):
        return False
    publish(run_dir)
    return True


def is_run(folder: Path) -> bool:
    """Whether Thinker wrote this folder: a view, or a run without one, unless another program put its weights there."""
    return (folder / OWN).exists() or (latest(folder) is not None and foreign_weights(folder) is None)


def holds_weights(folder: Path) -> bool:
    """Whether anybody's model lies there."""
    return (folder / WEIGHTS).exists() or foreign_weights(folder) is not None


def foreign_weights(folder: Path) -> Path | None:
    """What a folder is opened with, its weights or the index of several files, if another program wrote it."""
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if whole.exists():
        return whole if _step_of(whole) is None else None
    return index if index.exists() else None


def open_run(folder: Path) -> ModelFiles:
    """Open a Thinker directory. A view that a kill left in pieces or behind is first repaired, if it can be.

    One that is whole is read as it is where nothing can be written.
    """
    try:
        repair(folder)
    except OSError as error:
        if (problem := _inconsistency(folder)) is not None:
            raise ValueError(f"{folder}: {problem}, and it can't be repaired: {error}") from None
    if (problem := _inconsistency(folder)) is not None:
        raise ValueError(f"{folder}: {problem}; copy the folder again, or take it with its training/ folder")
    own = read_json(folder / OWN)
    if not isinstance(own.get("config"), dict):
        raise ValueError(f"{folder / OWN}: has no config")
    config = ThinkerConfig.from_mapping(own["config"], str(folder / OWN))
    values = read_json(folder / CONFIG)
    difference = disagreement(config, read_config(values, str(folder / CONFIG)))
    if difference is not None:
        raise ValueError(f"{folder}: {OWN} and {CONFIG} disagree: {difference}; undo the change to one of them")
    weights = read_safetensors(folder / WEIGHTS)
    return ModelFiles(
        config=config,
        tensors=open_tensors(config, weights, str(folder)),
        path=folder,
        dtype=next(iter(weights.dtype(name).name for name in weights)),
        step=_step_of(folder / OWN),
        modality=_open_modality(folder) if own.get("senses") else None,
        **read_text_files(folder, values, config.vocab_size),
    )


def _open_modality(folder: Path) -> Modality:
    from ..modality.settings import SensesConfig

    values = read_json(folder / SENSES)
    values.pop(STEP, None)
    return Modality(SensesConfig.from_mapping(values, str(folder / SENSES)), dict(read_safetensors(folder / MODALITY)))


def _inconsistency(folder: Path) -> str | None:
    """What is wrong with a view: a file missing, or files of different steps. None when it is whole."""
    foreign = foreign_weights(folder)
    if foreign is not None and (folder / OWN).exists():
        raise ValueError(
            f"{foreign}: was not written by Thinker, {OWN} was; delete {OWN} to open the folder without it"
        )
    needed = (WEIGHTS, CONFIG, OWN)
    missing = [name for name in needed if not (folder / name).exists()]
    if not missing and read_json(folder / OWN).get("senses"):
        missing = [name for name in (MODALITY, SENSES) if not (folder / name).exists()]
    if missing:
        return f"{missing[0]} is missing"
    optional = (name for name in (GENERATION, TOKENIZER_CONFIG, MODALITY, SENSES) if (folder / name).exists())
    steps = {name: _step_of(folder / name) for name in (WEIGHTS, CONFIG, *optional, OWN)}
    known = {name: step for name, step in steps.items() if step is not None}
    other = next((name for name in known if known[name] != known[WEIGHTS]), None)
    return None if other is None else f"{WEIGHTS} is of step {known[WEIGHTS]}, {other} of step {known[other]}"


def _lags(run_dir: Path, path: Path) -> bool:
    """Whether the state to publish was saved for others to see and not published any more.

    A view whose own state is damaged or gone is the best there is, and stays: the one to publish then is an older one,
    or the newest in place of the best.
    """
    state, step = load(path), _step_of(run_dir / OWN)
    return step is not None and step < state.step and best_step(state.state) in (None, state.step)


def _step_of(path: Path) -> int | None:
    """The step that a file of the view carries; None if another program wrote it."""
    if path.suffix == ".safetensors":
        text = read_safetensors(path).metadata.get("step", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
    step = read_json(path).get(STEP)
    return step if type(step) is int else None


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None
