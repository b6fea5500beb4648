"""The settings of a training run, and how a file, the defaults and flags become one.

A configuration file is flat: keys of the architecture (`thinker/config.py`) and of the run may stand in it together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config import ThinkerConfig, explain, read_json_with_comments
from ..places import expand_home
from .optim import Schedule, beta2_in_tokens

DEFAULT_MINUTES = 4.0
# β2 0.95 for steps of 8 x 512 tokens, and 0.99 for the 12 x 64 of nanoGPT, both as they are commonly set.
BETA2_TOKENS = 55_000.0


class TrainConfig(BaseModel):
    """How a model is trained. Unknown keys and impossible values raise `ValidationError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: tuple[str, ...] = Field(("stdlib",), description="named sets, files, folders or hub ids", min_length=1)
    out: Path | None = Field(None, description="the run's folder; unset means runs/NAME after the data")
    init: str | None = Field(None, description="start from this model's weights and tokenizer")
    chat: bool = Field(False, description="data are conversations, .jsonl with messages; learn the assistant's part")
    text: tuple[str, ...] = Field((), description="with chat: texts as for data, for some rows of every batch")
    text_share: float = Field(0.5, gt=0, lt=1, description="share of the rows that texts get")
    senses: Path | None = Field(None, description="a file: encoders of pictures and sound; unset means what data need")
    strict_media: bool = Field(False, description="end at the first picture or sound that can't be used")
    tokenizer: str = Field("bpe", description="bpe, char, or a tokenizer.json")
    steps: int | None = Field(None, ge=1, description="length in steps: repeats bit for bit")
    minutes: float | None = Field(None, gt=0, description=f"length in minutes; {DEFAULT_MINUTES:g} when neither is set")
    seed: int = Field(0, ge=0, lt=2**32, description="of initialisation, order and dropout")
    batch_size: int = Field(8, ge=1, description="rows that go through the model at once")
    accumulate: int = Field(1, ge=1, description="batches per step")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of the hidden matrices; the rest has AdamW")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(1e-2, gt=0, description="peak learning rate of Muon")
    weight_decay: float = Field(0.0, ge=0, description="of matrices, times the hidden ones' rate, a step")
    inherit: float = Field(
        0.0, ge=0, lt=1, description="share of its two parts' rows that a merged token's has, in embedding and head"
    )
    cooccurrence: int = Field(
        0, ge=0, description="tokens ahead that are counted for embedding and head to begin with; 0: they begin random"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float | None = Field(None, ge=0, lt=1, description="fixed; unset means that beta2_tokens decides")
    beta2_tokens: float | None = Field(
        None,
        gt=0,
        description=f"tokens in which Adam's β2 halves a gradient's weight; {BETA2_TOKENS:,.0f} when neither is set",
    )
    schedule: Schedule = Field("linear", description="linear to zero, cosine to a tenth, wsd, or constant")
    cooldown: float = Field(0.2, gt=0, lt=1, description="share of the run in which the rates of wsd fall")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the run in which the rates rise")
    ramp: int = Field(0, ge=0, description="first steps with fewer rows: a quarter of them, then half")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the run that the weights shown and published are a mean over; 0: the last",
    )
    early_stop: int = Field(
        0, ge=0, description="end after so many of 12 looks without a better held-out loss, publish the best; 0: off"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: two steps of each")
    compile: Literal["auto", "on", "off"] = Field("auto", description="auto: where the run is long enough to repay it")
    checkpoint_activations: bool = Field(False, description="recompute activations backward: less memory, more time")
    device: str = Field("auto", description="auto, cpu, cuda, …")
    threads: int | None = Field(None, ge=1, description="processor threads; unset means all cores")
    validate_every: float = Field(
        30.0, gt=0, description="seconds between looks at held-out text, where early_stop doesn't set them"
    )
    save_every: float = Field(120.0, gt=0, description="seconds between saves")
    keep: int = Field(2, ge=1, description="exact states kept for going on")
    prompt: str | None = Field(None, description="beginning of the samples shown; unset means the data's own")
    tensorboard: bool = Field(False, description="also write TensorBoard's files to OUT/tensorboard")

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if not all(self.data):
            raise ValueError("data holds an empty name: give a set, a file or a folder")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"steps {self.steps} and minutes {self.minutes:g} exclude each other: give one")
        if self.beta2 is not None and self.beta2_tokens is not None:
            raise ValueError(
                f"beta2 {self.beta2:g} and beta2_tokens {self.beta2_tokens:g} exclude each other: give one"
            )
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup {self.warmup:g} and cooldown {self.cooldown:g} exceed the run: lower one")
        if self.average and self.chat:
            raise ValueError(f"average {self.average:g} is for texts alone: drop average, or chat")
        if self.cooccurrence and (self.chat or self.init is not None):
            other = "chat" if self.chat else "init"
            raise ValueError(
                f"cooccurrence {self.cooccurrence} is for new models of texts: drop cooccurrence, or {other}"
            )
        if (self.senses is not None or self.text) and not self.chat:
            field = "text" if self.text else "senses"
            raise ValueError(f"{field} goes with conversations: add chat, or drop {field}")
        if self.text and self.ramp:
            raise ValueError(
                f"text and ramp {self.ramp} exclude each other: drop ramp, whose small batches hold no text"
            )
        if self.text and not 1 <= self.text_rows < self.batch_size * self.accumulate:
            raise ValueError(
                f"text_share {self.text_share:g} of {self.batch_size * self.accumulate} rows leaves none for one side: "
                "raise batch_size"
            )
        return self

    @property
    def limit(self) -> tuple[int | None, float | None]:
        """The run's length: (steps, None) or (None, seconds)."""
        if self.steps is not None:
            return self.steps, None
        return None, 60 * (self.minutes if self.minutes is not None else DEFAULT_MINUTES)

    def adam_beta2(self, tokens: int) -> float:
        """Adam's β2 for a step of so many tokens."""
        if self.beta2 is not None:
            return self.beta2
        return beta2_in_tokens(tokens, self.beta2_tokens if self.beta2_tokens is not None else BETA2_TOKENS)

    @property
    def text_rows(self) -> int:
        """Rows of a step's batch that are windows of text."""
        return round(self.text_share * self.batch_size * self.accumulate) if self.text else 0

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        if self.out is not None:
            return self.out
        data = Path(self.data[0])
        # "." and ".." are no names: a run of that name would be in runs/ itself, or beside it.
        name = data.stem if data.name not in ("", "..") else data.resolve().stem
        return Path("runs") / (name or "root")

    def changed(self, **fields: Any) -> TrainConfig:
        """The same settings with some replaced, checked again; what nobody set still counts as not set."""
        return type(self).model_validate(self.model_dump(exclude_unset=True) | fields)


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
    for name in ("out", "init", "senses"):
        if isinstance(path := given.get(name), str | Path):
            given[name] = str(expand_home(path))
    run = {name: value for name, value in given.items() if name in TrainConfig.model_fields}
    architecture = {name: value for name, value in given.items() if name not in run}
    try:
        return ThinkerConfig.model_validate(architecture), TrainConfig.model_validate(run), set(given)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from None
