"""The exact state of a run, `training/step-00001200/`: what going on needs, bit for bit, and nothing for anyone else.

Parameters in float32 and unfolded under Thinker's own names, the optimiser's tensors, and the run's decisions as JSON.
A state is written under a temporary name, synced, and renamed to a fresh one; the newest whole one is found by looking.
The view that other programs read is made from it in `publish.py`; what the decisions mean, `train/` knows.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ThinkerConfig
from ..formats.tensors import check_shapes, parameter_shapes
from .files import read_json, read_text, remove_leftovers, sync, temporary_name, write_json, write_text
from .reader import read_safetensors
from .writer import write_safetensors

FOLDER = "training"
PARAMETERS, OPTIMIZER, STATE, TOKENIZER = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
)
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class TrainingState:
    """One exact state, its arrays memory-mapped and read-only."""

    path: Path
    step: int
    config: ThinkerConfig
    parameters: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]
    state: dict[str, Any]
    tokenizer_json: str | None


def save(
    run_dir: Path,
    step: int,
    parameters: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    *,
    tokenizer_json: str | None = None,
    keep: int = 2,
) -> Path:
    """Save one state and return its folder; afterwards only the newest `keep` states stay.

    `state` is anything JSON holds and has the architecture under "config". Parameters must be those of the architecture
    in float32. NaN, infinity and a newer state in the same run raise `ValueError`, and nothing older is lost.
    """
    assert step >= 0, step
    assert keep >= 1, keep
    config = ThinkerConfig.from_mapping(state["config"], "state")
    training = run_dir / FOLDER
    training.mkdir(parents=True, exist_ok=True)
    remove_leftovers(training)
    newer = [number for number, _, path in _states(training) if number > step and _is_whole(path)]
    if newer:
        raise ValueError(
            f"{training}: holds step {max(newer)}, later than step {step}: resume it or choose another folder"
        )
    _check_parameters(config, {name: parameters[name] for name in parameters}, str(training))

    temporary = temporary_name(training / f"step-{step:08d}")
    temporary.mkdir()
    try:
        metadata = {"step": str(step)}
        write_safetensors(temporary / PARAMETERS, parameters, metadata)
        write_safetensors(temporary / OPTIMIZER, optimizer, metadata)
        if tokenizer_json is not None:
            write_text(temporary / TOKENIZER, tokenizer_json)
        write_json(temporary / STATE, {**state, "step": step})
        sync(temporary)
        path = _fresh_name(training, step)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(training)
    _prune(training, keep)
    return path


def latest(run_dir: Path) -> Path | None:
    """The newest whole state of a run, or None. Unfinished and damaged ones are passed over."""
    for _, _, path in sorted(_states(run_dir / FOLDER), reverse=True):
        if _is_whole(path):
            return path
    return None


def load(path: Path) -> TrainingState:
    """Open one state. Whatever is missing, damaged or inconsistent raises a `ValueError` that names it."""
    values = read_json(path / STATE)
    step = values.pop("step", None)
    if type(step) is not int or step < 0:
        raise ValueError(f"{path / STATE}: has no step")
    if not isinstance(values.get("config"), dict):
        raise ValueError(f"{path / STATE}: has no config")
    config = ThinkerConfig.from_mapping(values["config"], str(path / STATE))
    parameters, optimizer = read_safetensors(path / PARAMETERS), read_safetensors(path / OPTIMIZER)
    for file in (parameters, optimizer):
        if file.metadata.get("step") != str(step):
            raise ValueError(f"{file.path}: belongs to step {file.metadata.get('step')}, {STATE} to step {step}")
    _check_parameters(config, parameters, str(path / PARAMETERS))
    tokenizer = path / TOKENIZER
    return TrainingState(
        path=path,
        step=step,
        config=config,
        parameters=parameters,
        optimizer=optimizer,
        state=values,
        tokenizer_json=read_text(tokenizer) if tokenizer.exists() else None,
    )


def _check_parameters(config: ThinkerConfig, parameters: Mapping[str, np.ndarray], where: str) -> None:
    if config.n_layers > len(parameters):
        raise ValueError(f"{where}: {len(parameters)} parameters are too few for {config.n_layers} layers")
    check_shapes(parameter_shapes(config), {name: parameters[name].shape for name in parameters}, where)
    for name in parameters:
        if parameters[name].dtype != np.float32:
            raise ValueError(f"{where}: {name} has type {parameters[name].dtype}, the exact state keeps float32")


def _states(training: Path) -> list[tuple[int, int, Path]]:
    """Step, number of the save at that step, and folder, of everything that has a finished name."""
    if not training.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in training.iterdir() if path.is_dir())
    return [(int(match[1]), int(match[2] or 0), path) for match, path in found if match is not None]


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except ValueError:
        return False
    return True


def _fresh_name(training: Path, step: int) -> Path:
    """A name not taken: a folder can't be renamed over one that has something in it."""
    taken = [again for number, again, _ in _states(training) if number == step]
    return training / (f"step-{step:08d}.{max(taken) + 1}" if taken else f"step-{step:08d}")


def _prune(training: Path, keep: int) -> None:
    """Delete the older whole states. First a rename, so that a kill leaves no half of one under a finished name.

    What can't be read stays: the trouble may be the disk's, and pass.
    """
    whole = [path for _, _, path in sorted(_states(training), reverse=True) if _is_whole(path)]
    for path in whole[keep:]:
        doomed = temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
