"""The architecture of one model: what a checkpoint must know to be rebuilt, and nothing about how it was trained.

`ThinkerConfig` checks every combination when it is made, so that no other room has to. Files are JSON, flat, and may
hold `//` comments. The keys of a training run live in `train/config.py`, though one file may hold both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import json5
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Activation = Literal["silu", "gelu", "relu", "relu2"]


class RopeScaling(BaseModel):
    """Llama 3's stretching of the RoPE wavelengths ("The Llama 3 Herd of Models", arXiv 2407.21783)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(gt=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_ctx_len: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be less than high_freq_factor {self.high_freq_factor}"
            )
        return self


class ThinkerConfig(BaseModel):
    """The architecture. Unknown keys, values out of range and impossible combinations raise `ValidationError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(default=5000, ge=1, description="number of tokens; a ceiling when a tokenizer is trained")
    n_layers: int = Field(default=4, ge=1, description="transformer blocks")
    d_model: int = Field(default=256, ge=1, description="embedding width")
    n_heads: int = Field(default=4, ge=1, description="query heads")
    d_ff: int = Field(default=1024, ge=1, description="hidden width of the MLP, or of one expert")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="on the embedding and the residual branches")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the RoPE wavelengths")
    ctx_len: int = Field(default=512, ge=1, description="longest sequence")
    use_swiglu: bool = Field(default=True, description="gated MLP; false gives the plain two-matrix MLP")
    use_gqa: bool = Field(default=False, description="share key/value heads among query heads (arXiv 2305.13245)")
    kv_groups: int | None = Field(default=None, ge=1, description="key/value heads with GQA; unset means n_heads // 2")
    use_moe: bool = Field(default=False, description="a mixture of SwiGLU experts in place of the MLP")
    num_experts: int = Field(default=8, ge=1, description="experts per layer")
    num_experts_per_tok: int = Field(default=2, ge=1, description="experts that compute for one token")
    activation: Activation | None = Field(
        default=None, description="unset means silu in the gate, gelu in the plain MLP"
    )
    use_qk_norm: bool = Field(
        default=False, description="RMSNorm on every head of q and k, before RoPE (arXiv 2302.05442)"
    )
    layer_scale: float | None = Field(
        default=None, description="initial value of a learned scale on each residual branch"
    )
    tie_embeddings: bool = Field(default=False, description="the head shares the embedding's matrix")
    head_dim: int | None = Field(default=None, ge=2, description="width of one head; unset means d_model / n_heads")
    norm_eps: float = Field(default=1e-6, gt=0, description="added to the mean square in every RMSNorm")
    balance_loss: float = Field(default=0.01, ge=0, description="weight of the load-balancing loss of a mixture")
    rope_scaling: RopeScaling | None = Field(default=None, description="Llama 3's rope scaling, for imported models")

    @model_validator(mode="after")
    def _possible(self) -> ThinkerConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: change one, or set head_dim"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd, and RoPE turns pairs: change n_heads or head_dim")
        if self.kv_groups is not None and not self.use_gqa:
            raise ValueError(f"kv_groups {self.kv_groups} has no effect without use_gqa: set it, or drop kv_groups")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not divisible by kv_groups {self.n_kv_heads}: "
                f"choose kv_groups among {[g for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]}"
            )
        if self.layer_scale == 0:
            raise ValueError("layer_scale 0 on branches that begin at zero never trains: choose another, say 0.1")
        if self.use_moe and not self.use_swiglu:
            raise ValueError("use_moe needs use_swiglu: the experts are SwiGLU, so set use_swiglu to true")
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}: lower it"
            )
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads: all heads without GQA."""
        if not self.use_gqa:
            return self.n_heads
        return self.kv_groups if self.kv_groups is not None else max(1, self.n_heads // 2)

    @property
    def activation_name(self) -> Activation:
        """The activation in use, with the default resolved."""
        return self.activation or ("silu" if self.use_swiglu else "gelu")

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part. Their sum is the size of the model; a tied head counts nothing."""
        width = self.head_width
        heads = self.d_model * width * (2 * self.n_heads + 2 * self.n_kv_heads)
        attention = heads + (2 * width if self.use_qk_norm else 0)
        mlp = self.d_model * self.d_ff * (3 if self.use_swiglu else 2)
        if self.use_moe:
            mlp = self.num_experts * mlp + self.d_model * self.num_experts
        scales = 2 * self.d_model if self.layer_scale is not None else 0
        return {
            "embedding": self.vocab_size * self.d_model,
            "attention": self.n_layers * attention,
            "mlp": self.n_layers * mlp,
            "norms": (2 * self.n_layers + 1) * self.d_model + self.n_layers * scales,
            "head": 0 if self.tie_embeddings else self.vocab_size * self.d_model,
        }

    def parameter_count(self) -> int:
        """The exact number of parameters of `ThinkerLM` with this architecture."""
        return sum(self.parameter_counts().values())

    def changed(self, **fields: Any) -> ThinkerConfig:
        """The same architecture with some fields replaced, checked again."""
        return type(self).model_validate(self.model_dump() | fields)

    @classmethod
    def from_json(cls, path: str | Path) -> ThinkerConfig:
        """Read a configuration file; comments are allowed. Raises `ValueError` that names the file."""
        return cls.from_mapping(read_json_with_comments(path), where=str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> ThinkerConfig:
        """Check values that came from `where`, which a `ValueError` names."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(error, where)) from None

    def to_json(self) -> str:
        """JSON of every field that is set."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def read_json_with_comments(path: str | Path) -> dict[str, Any]:
    """One JSON object with `//` comments allowed. Raises `ValueError` naming the file and what is wrong there."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration ({error})") from None
    try:
        values = json5.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a configuration is one object in braces, found {type(values).__name__}")
    return values


def explain(error: ValidationError, where: str) -> str:
    """A validation error as one line: where, field, value, remedy."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {field!r}: remove it or check its spelling")
        elif field:
            parts.append(f"{field} is {item['input']!r}: {message[0].lower()}{message[1:]}")
        else:
            parts.append(message)
    return f"{where}: " + "; ".join(parts)
