"""The exact state of a run, `training/step-00001200/`: what going on needs, bit for bit, and nothing for anyone else.

Parameters in float32 and unfolded under Thinker's own names, the optimiser's tensors, and the run's decisions as JSON.
A state is written under a temporary name, synced, and renamed to a fresh one; the newest whole one is found by looking.
The view that other programs read is made from it in `publish.py`; what the decisions mean, `train/` knows.
"""

from __future__ import annotations

import errno
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
PARAMETERS, OPTIMIZER, MODALITY, STATE, TOKENIZER = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "modality.safetensors",
    "state.json",
    "tokenizer.json",
)
MEAN = "mean"  # of a parameter's late values: kept under NAME/mean among the optimiser's tensors
_CLAIMED: dict[Path, int] = {}  # folders and open files whose locks this process holds
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
    modality: Mapping[str, np.ndarray] | None = None  # encoders and projectors, which state["senses"] describes

    @property
    def shown(self) -> Mapping[str, np.ndarray]:
        """What others see for the parameters: the means of their late values, where the run keeps any."""
        return {name: self.optimizer.get(f"{name}/{MEAN}", self.parameters[name]) for name in self.parameters}


def save(
    run_dir: Path,
    step: int,
    parameters: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    *,
    tokenizer_json: str | None = None,
    modality: Mapping[str, np.ndarray] | None = None,
    keep: int = 2,
) -> Path:
    """Save one state and return its folder; afterwards only the newest `keep` states stay, and the best.

    `state` is anything JSON holds and has the architecture under "config", and under "senses" that of encoders and
    projectors if there is any `modality`. Parameters must be those of the architecture
    in float32. NaN, infinity and a newer state in the same run raise `ValueError`, and nothing older is lost.
    """
    assert step >= 0, step
    assert keep >= 1, keep
    assert (modality is None) == (state.get("senses") is None), "tensors and configuration of senses go together"
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
        if modality is not None:
            write_safetensors(temporary / MODALITY, modality, metadata)
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
    _prune(training, keep, best_step(state))
    return path


def claim(run_dir: Path) -> None:
    """Keep other processes from training in a folder as long as this one lives, where the system has such locks.

    Raises `ValueError` if another does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    folder = (run_dir / FOLDER).resolve()
    if folder in _CLAIMED:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"{run_dir}: another process trains there: name another folder with --out") from None
        return  # a file system without locks
    _CLAIMED[folder] = lock


def begun(run_dir: Path) -> bool:
    """Whether a run has saved anything there, be it damaged by now."""
    return bool(_states(run_dir / FOLDER))


def latest(run_dir: Path) -> Path | None:
    """The newest whole state of a run, or None. Unfinished and damaged ones are passed over."""
    for _, _, path in sorted(_states(run_dir / FOLDER), reverse=True):
        if _is_whole(path):
            return path
    return None


def to_publish(run_dir: Path) -> Path | None:
    """The state that others shall see: the best one by held-out loss, if the run looks for one, else the newest."""
    newest = latest(run_dir)
    best = best_step(load(newest).state) if newest is not None else None
    if best is None:
        return newest
    of_best = [path for step, _, path in sorted(_states(run_dir / FOLDER)) if step == best and _is_whole(path)]
    return of_best[-1] if of_best else newest


def best_step(state: Mapping[str, Any]) -> int | None:
    """The step with the lowest held-out loss so far, where a state knows one."""
    return (state.get("best") or {}).get("step")


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
    modality = read_safetensors(path / MODALITY) if values.get("senses") is not None else None
    for file in (parameters, optimizer, *([] if modality is None else [modality])):
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
        modality=modality,
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


def _prune(training: Path, keep: int, best: int | None) -> None:
    """Delete the older whole states but the best. First a rename, so that a kill leaves no half of one behind.

    What can't be read stays: the trouble may be the disk's, and pass.
    """
    whole = [(step, path) for step, _, path in sorted(_states(training), reverse=True) if _is_whole(path)]
    spared = next((path for step, path in whole if step == best), None)
    for path in (path for _, path in whole[keep:] if path != spared):
        doomed = temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
