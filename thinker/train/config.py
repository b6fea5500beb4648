"""The settings of a training run, and how a file, the defaults and flags become one.

A configuration file is flat: keys of the architecture (`thinker/config.py`) and of the run may stand in it together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config import ThinkerConfig, explain, read_json_with_comments
from .optim import Schedule

DEFAULT_MINUTES = 4.0


class TrainConfig(BaseModel):
    """How a model is trained. Unknown keys and impossible values raise `ValidationError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: tuple[str, ...] = Field(("stdlib",), description="named sets, files, folders or hub ids", min_length=1)
    out: Path | None = Field(None, description="the run's folder; unset means runs/NAME after the data")
    init: str | None = Field(None, description="start from this model's weights and tokenizer")
    chat: bool = Field(False, description="data are conversations, .jsonl with messages; learn the assistant's part")
    tokenizer: str = Field("bpe", description="bpe, char, or a tokenizer.json")
    steps: int | None = Field(None, ge=1, description="length in steps: repeats bit for bit")
    minutes: float | None = Field(None, gt=0, description=f"length in minutes; {DEFAULT_MINUTES:g} when neither is set")
    seed: int = Field(0, ge=0, lt=2**32, description="of initialisation, order and dropout")
    batch_size: int = Field(8, ge=1, description="rows that go through the model at once")
    accumulate: int = Field(1, ge=1, description="batches per step")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of the hidden matrices; the rest has AdamW")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(1e-2, gt=0, description="peak learning rate of Muon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on hidden matrices only")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    schedule: Schedule = Field("linear", description="linear to zero, cosine to a tenth, or constant")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the run in which the rates rise")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: two steps of each")
    compile: Literal["auto", "on", "off"] = Field("auto", description="auto: where the run is long enough to repay it")
    checkpoint_activations: bool = Field(False, description="recompute activations backward: less memory, more time")
    device: str = Field("auto", description="auto, cpu, cuda, …")
    threads: int | None = Field(None, ge=1, description="processor threads; unset means all cores")
    validate_every: float = Field(30.0, gt=0, description="seconds between looks at held-out text")
    save_every: float = Field(120.0, gt=0, description="seconds between saves")
    keep: int = Field(2, ge=1, description="exact states kept for going on")
    prompt: str | None = Field(None, description="beginning of the samples shown; unset means the data's own")
    tensorboard: bool = Field(False, description="also write TensorBoard's files to OUT/tensorboard")

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"steps {self.steps} and minutes {self.minutes:g} exclude each other: give one")
        return self

    @property
    def limit(self) -> tuple[int | None, float | None]:
        """The run's length: (steps, None) or (None, seconds)."""
        if self.steps is not None:
            return self.steps, None
        return None, 60 * (self.minutes if self.minutes is not None else DEFAULT_MINUTES)

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.out if self.out is not None else Path("runs") / Path(self.data[0]).stem

    def changed(self, **fields: Any) -> TrainConfig:
        """The same settings with some replaced, checked again."""
        return type(self).model_validate(self.model_dump() | fields)


def read_settings(file: Path | None, flags: Mapping[str, Any]) -> tuple[ThinkerConfig, TrainConfig, set[str]]:
    """A file's keys, overridden by flags, as architecture and run, and the names that were given by either.

    Raises `ValueError` that names the file or the flags, the field, its value and a remedy.
    """
    given = read_json_with_comments(file) if file is not None else {}
    where = f"{file} and flags" if file is not None and flags else str(file or "thinker train")
    if "steps" in flags:
        given.pop("minutes", None)
    if "minutes" in flags:
        given.pop("steps", None)
    given |= flags
    run = {name: value for name, value in given.items() if name in TrainConfig.model_fields}
    architecture = {name: value for name, value in given.items() if name not in run}
    try:
        return ThinkerConfig.model_validate(architecture), TrainConfig.model_validate(run), set(given)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from None
