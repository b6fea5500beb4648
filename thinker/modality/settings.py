"""How a model sees and hears: the encoders and projectors of one model, what they take in, and what is trained.

`SensesConfig` is stored with the model, as `ThinkerConfig` is. It checks what is impossible when it is made. Nothing
here opens a file of a picture or a sound, and nothing imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..config import ThinkerConfig, explain, read_json_with_comments

Kind = Literal["image", "audio"]
KINDS: tuple[Kind, ...] = ("image", "audio")

PREPARATION = 1  # raise it when the same file would be prepared otherwise, or no longer be refused
AUDIO_STRIDE = 4  # log-mel frames that become one position: two convolutions of stride 2


class NotInstalled(ValueError):
    """Files of a kind can't be opened for want of a package: no fault of any of them, and the same for all."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} need {package}: pip install 'thinker[senses]'")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def structure(self) -> dict[str, Any]:
        """What the shapes and the meaning of the tensors depend on."""
        free = {"frozen", "dropout", "augment"}
        return self.model_dump(mode="json", exclude={*free, "projector"}) | {
            "projector": self.model_dump(mode="json", include={"projector": {"kind", "hidden"}})
        }


class ProjectorConfig(_Part):
    """From an encoder's width to d_model: one matrix, or two with a GELU between."""

    kind: Literal["linear", "mlp"] = Field("mlp", description="linear, or two layers with an activation")
    hidden: int | None = Field(None, ge=1, description="width between two layers; unset means d_model")
    frozen: bool = Field(False, description="leave it as it was initialised")


class _Blocks(_Part):
    """What both encoders have: non-causal blocks made of the Thinker's own parts."""

    layers: int = Field(2, ge=1, description="non-causal blocks")
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    frozen: bool = Field(False, description="leave it as it is")
    augment: bool = Field(True, description="training sees each picture or recording a little changed every time")
    projector: ProjectorConfig = Field(default_factory=lambda: ProjectorConfig.model_validate({}))

    def blocks(self, width: int, positions: int) -> ThinkerConfig:
        """The architecture of the blocks; its vocabulary has no meaning."""
        return ThinkerConfig(
            vocab_size=1,
            n_layers=self.layers,
            d_model=width,
            n_heads=self.heads,
            d_ff=2 * width,
            dropout=self.dropout,
            ctx_len=positions,
        )


class PictureConfig(_Blocks):
    """Pictures are scaled to one size and cut into patches, each of which becomes one position."""

    kind: Literal["patches"] = "patches"
    width: int = Field(128, ge=2, description="features of a patch")
    size: int = Field(32, ge=1, le=4096, description="height and width in pixels that every picture is scaled to")
    channels: Literal[1, 3] = Field(1, description="1 for grey, 3 for colour")
    patch: int = Field(8, ge=1, description="height and width of a patch in pixels")

    @model_validator(mode="after")
    def _possible(self) -> PictureConfig:
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not divisible by patch {self.patch}: change one of them")
        self.blocks(self.width, self.positions)
        return self

    @property
    def positions(self) -> int:
        """Patches of a picture."""
        return (self.size // self.patch) ** 2


class SoundConfig(_Blocks):
    """Recordings become log-mel frames every 10 ms, four of which become one position."""

    kind: Literal["log-mel"] = "log-mel"
    width: int = Field(192, ge=2, description="features of a position, 40 ms")
    rate: int = Field(8000, ge=1000, le=192_000, description="samples per second that every recording is brought to")
    mels: int = Field(40, ge=1, le=256, description="bands of the mel spectrogram")
    level_bands: bool = Field(
        False,
        description="take each band's mean off, which tells voices and microphones apart and not words; a steady tone "
        "is then silence",
    )
    max_seconds: float = Field(10.0, gt=0, description="longer recordings are refused")

    @model_validator(mode="after")
    def _possible(self) -> SoundConfig:
        self.blocks(self.width, self.max_positions)
        return self

    @property
    def window(self) -> int:
        """Samples of one frame's window: 25 ms."""
        return round(0.025 * self.rate)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next: 10 ms."""
        return round(0.010 * self.rate)

    @property
    def max_positions(self) -> int:
        """Positions of the longest recording."""
        return self.positions(1 + math.ceil(self.max_seconds * self.rate) // self.hop)

    def positions(self, frames: int) -> int:
        """Positions of a recording of so many frames."""
        return -(-frames // AUDIO_STRIDE)


class FeatureConfig(_Part):
    """Features that were computed elsewhere, n × width, come from .npy or safetensors files; each is one position."""

    kind: Literal["features"] = "features"
    width: int = Field(ge=1, description="values of one feature")
    projector: ProjectorConfig = Field(default_factory=lambda: ProjectorConfig.model_validate({}))


Encoder = Annotated[PictureConfig | FeatureConfig, Field(discriminator="kind")]
Listener = Annotated[SoundConfig | FeatureConfig, Field(discriminator="kind")]


class SensesConfig(_Part):
    """Which senses a model has, and how they are built."""

    image: Encoder | None = None
    audio: Listener | None = None
    freeze_thinker: bool = Field(False, description="train encoders and projectors alone")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The senses there are."""
        return tuple(kind for kind in KINDS if self.of(kind) is not None)

    def of(self, kind: Kind) -> PictureConfig | SoundConfig | FeatureConfig | None:
        """How one sense is built; None if the model lacks it."""
        return self.image if kind == "image" else self.audio

    def needed(self, kind: Kind) -> PictureConfig | SoundConfig | FeatureConfig:
        """As `of`. Raises `ValueError` if the model lacks it."""
        config = self.of(kind)
        if config is None:
            has = " and ".join(self.kinds) or "none"
            raise ValueError(f"this model has no encoder for {kind} (it has {has}): train one, or leave that out")
        return config

    def preparation(self) -> dict[str, Any]:
        """JSON values on which it depends what files become before any encoder sees them."""
        learned = {"width", "layers", "heads", "dropout", "frozen", "augment", "projector"}
        whole = self.model_dump(mode="json", include={"image", "audio"}, exclude={"image": learned, "audio": learned})
        for kind in self.kinds:
            if isinstance(config := self.of(kind), FeatureConfig):
                whole[kind]["width"] = config.width
        return whole | {"version": PREPARATION}

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> SensesConfig:
        """Check values that came from `where`, which a `ValueError` names."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(error, where)) from None

    @classmethod
    def from_json(cls, path: str | Path) -> SensesConfig:
        """Read a file, in which `//` comments are allowed. Raises `ValueError` that names it."""
        values = read_json_with_comments(path)
        for kind, default in (("image", "patches"), ("audio", "log-mel")):
            if isinstance(values.get(kind), dict):
                values[kind].setdefault("kind", default)
        return cls.from_mapping(values, str(path))
