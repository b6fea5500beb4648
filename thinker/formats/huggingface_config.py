"""`config.json` of the five Hugging Face classes, both ways: `ThinkerConfig` to their keys, and strictly back.

Reads the forms of transformers 4 and 5 and refuses by name what Thinker can't compute: better no model than a wrong
one. Names of tensors are in `huggingface.py`, tokenizers in `huggingface_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.files import brief
from ..config import Activation, ThinkerConfig

OWN_CLASS, OWN_TYPE = "ThinkerForCausalLM", "thinker"
LONGEST = 2**20  # positions; a greater number is most likely damage, and its angles would fill the memory
MOST_HEADS = 2**16


@dataclass(frozen=True)
class Family:
    """One class: what distinguishes its network, and the values its configuration has when a key is left out."""

    class_name: str
    model_type: str
    defaults: Mapping[str, Any]
    use_swiglu: bool = True
    use_moe: bool = False
    use_qk_norm: bool = False


_COMMON = {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "num_key_value_heads": None}
_LLAMA = _COMMON | {"max_position_embeddings": 2048}
_ARCEE = _COMMON | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_MIXTRAL = _COMMON | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
_MIXTRAL |= {"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2}
_QWEN = _COMMON | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
_QWEN_MOE = {key: value for key, value in _QWEN.items() if key != "head_dim"}
_QWEN_MOE |= {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False}
FAMILIES = (
    Family("LlamaForCausalLM", "llama", _LLAMA),
    Family("MixtralForCausalLM", "mixtral", _MIXTRAL, use_moe=True),
    Family("Qwen3ForCausalLM", "qwen3", _QWEN, use_qk_norm=True),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", _QWEN_MOE, use_moe=True, use_qk_norm=True),
    Family("ArceeForCausalLM", "arcee", _ARCEE, use_swiglu=False),
)
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
# Keys whose every other value changes the network in a way that Thinker doesn't compute.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "qkv_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "shared_expert_intermediate_size": (0, None),
    "n_shared_experts": (0, None),
    "quantization_config": (None,),
}


def family_of(config: ThinkerConfig) -> Family:
    """The class that a model with this architecture is published as."""
    if expressible(config) is not None:
        return _own(config.use_swiglu, config.use_moe, config.use_qk_norm)
    wanted = (config.use_swiglu, config.use_moe, config.use_qk_norm)
    return next(family for family in FAMILIES if (family.use_swiglu, family.use_moe, family.use_qk_norm) == wanted)


def expressible(config: ThinkerConfig) -> str | None:
    """None when one of the five classes computes this network, otherwise the reason why none does."""
    if not config.use_swiglu and config.use_qk_norm:
        return "no Hugging Face class has the plain MLP together with QK-norm"
    if not config.use_moe and not config.use_qk_norm and config.d_model % config.n_heads:
        name = "LlamaForCausalLM" if config.use_swiglu else "ArceeForCausalLM"
        return f"{name} refuses a width of {config.d_model} that its {config.n_heads} heads don't divide"
    return None


def _own(use_swiglu: bool, use_moe: bool, use_qk_norm: bool) -> Family:
    """What none of the five can express, written with the same keys; Thinker alone reads it."""
    return Family(OWN_CLASS, OWN_TYPE, _COMMON, use_swiglu, use_moe, use_qk_norm)


def write_config(config: ThinkerConfig, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`, without the ids of special tokens, for weights of `dtype`."""
    family = family_of(config)
    values: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": config.activation_name,
        "max_position_embeddings": config.ctx_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_cache": True,
        # transformers 4 reads the first two, transformers 5 the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if (scaling := config.rope_scaling) is not None:
        factors = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_ctx_len,
        }
        values["rope_scaling"] = factors
        values["rope_parameters"] = factors | {"rope_theta": config.rope_theta}
    if config.use_moe:
        values |= {
            "num_experts": config.num_experts,
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.balance_loss,
            "output_router_logits": False,
        }
    if family.model_type == "qwen3_moe":
        values |= {
            "moe_intermediate_size": config.d_ff,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if config.use_qk_norm:
        values |= {"use_sliding_window": False, "max_window_layers": config.n_layers}
    if family.class_name == OWN_CLASS:
        values |= {"use_swiglu": config.use_swiglu, "use_moe": config.use_moe, "use_qk_norm": config.use_qk_norm}
    return values


def read_config(values: Mapping[str, Any], where: str) -> ThinkerConfig:
    """The architecture that a `config.json` describes. What Thinker doesn't compute raises `ValueError` by name."""
    family = _find_family(values, where)
    # null stands for the class's own value, except that of the heads for keys and values: as many as for queries.
    known = {key: value for key, value in values.items() if value is not None or key == "num_key_value_heads"}
    merged = dict(family.defaults) | known
    _refuse_unsupported(merged, family, where)
    heads = _integer(merged, "num_attention_heads", where)
    width = _integer(merged, "hidden_size", where)
    kv_heads = heads if merged.get("num_key_value_heads") is None else _integer(merged, "num_key_value_heads", where)
    head_dim = _integer(merged, "head_dim", where) if "head_dim" in merged else None
    if heads > MOST_HEADS:
        raise ValueError(f"{where}: num_attention_heads {heads} is beyond {MOST_HEADS}")
    theta, scaling = _read_rope(values, family, where)
    qwen_moe = family.model_type == "qwen3_moe"
    fields: dict[str, Any] = {
        "vocab_size": _integer(merged, "vocab_size", where),
        "n_layers": _integer(merged, "num_hidden_layers", where),
        "d_model": width,
        "n_heads": heads,
        "d_ff": _integer(merged, "moe_intermediate_size" if qwen_moe else "intermediate_size", where),
        "ctx_len": _integer(merged, "max_position_embeddings", where),
        "dropout": 0.0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": _number(merged, "rms_norm_eps", where),
        "use_swiglu": family.use_swiglu,
        "use_qk_norm": family.use_qk_norm,
        "use_moe": family.use_moe,
        "tie_embeddings": _flag(merged, "tie_word_embeddings", where),
        "activation": _read_activation(merged, family, where),
        # An explicit width that is the usual one says nothing.
        "head_dim": None if head_dim is None or head_dim * heads == width else head_dim,
    }
    if fields["ctx_len"] > LONGEST:
        raise ValueError(f"{where}: max_position_embeddings {fields['ctx_len']} is beyond {LONGEST}")
    if kv_heads != heads:
        fields |= {"use_gqa": True, "kv_groups": kv_heads}
    if family.use_moe:
        fields["num_experts"] = _expert_count(values, family, where)
        fields["num_experts_per_tok"] = _integer(merged, "num_experts_per_tok", where)
        if "router_aux_loss_coef" in merged:
            fields["balance_loss"] = _number(merged, "router_aux_loss_coef", where)
    return ThinkerConfig.from_mapping(fields, where)


def disagreement(config: ThinkerConfig, other: ThinkerConfig) -> str | None:
    """The first point in which two configurations describe different networks, with both values."""
    first, second = _essence(config), _essence(other)
    return next((f"{key} {first[key]} and {second[key]}" for key in first if first[key] != second[key]), None)


def _essence(config: ThinkerConfig) -> dict[str, Any]:
    """What decides the function that a network computes, however it is written down."""
    sizes = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "head_width", "ctx_len")
    numbers = ("rope_theta", "rope_scaling", "norm_eps", "activation_name", "layer_scale")
    switches = ("use_swiglu", "use_qk_norm", "use_moe", "tie_embeddings")
    values = {key: getattr(config, key) for key in (*sizes, *numbers, *switches)}
    if config.use_moe:
        values |= {"num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return values


def _find_family(values: Mapping[str, Any], where: str) -> Family:
    model_type, classes = values.get("model_type"), values.get("architectures") or []
    own = [values.get(key) for key in ("use_swiglu", "use_moe", "use_qk_norm")]
    if model_type == OWN_TYPE and all(isinstance(flag, bool) for flag in own):
        return _own(*map(bool, own))
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        names = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"{where}: model_type '{brief(model_type)}' is not supported; Thinker opens {names}")
    if not isinstance(classes, list) or any(name != family.class_name for name in classes):
        raise ValueError(f"{where}: architectures {brief(classes, 80)} is not supported, only {family.class_name}")
    return family


def _refuse_unsupported(values: Mapping[str, Any], family: Family, where: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in values and values[key] not in neutral:
            raise ValueError(f"{where}: {key} {brief(values[key])} is not supported")
    if family.model_type == "qwen3_moe" and values["norm_topk_prob"] is not True:
        raise ValueError(f"{where}: norm_topk_prob must be true: Thinker's experts' weights sum to 1")
    window = values.get("sliding_window")
    used = window is not None and values.get("use_sliding_window", family.model_type not in ("qwen3", "qwen3_moe"))
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{where}: layer_types other than full_attention are not supported")
    # A window as long as the context hides nothing.
    if used and not (isinstance(window, int) and window >= _integer(values, "max_position_embeddings", where)):
        raise ValueError(f"{where}: sliding_window {brief(window)} is not supported: Thinker attends to everything")


def _read_rope(values: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling as `ThinkerConfig` has them.

    transformers 4 has them in rope_theta and rope_scaling, transformers 5 in rope_parameters.
    """
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    for key, settings in (("rope_scaling", old), ("rope_parameters", new)):
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{where}: {key} must be an object")
        if settings and any(isinstance(value, dict) for value in settings.values()):
            raise ValueError(f"{where}: {key} that differ by kind of layer are not supported")
    settings = old or new or {}
    bases = {
        _number(place, "rope_theta", where)
        for place in (values, old or {}, new or {})
        if place.get("rope_theta") is not None
    }
    if len(bases) > 1:
        raise ValueError(f"{where}: rope_theta is given as {' and as '.join(map(str, sorted(bases)))}")
    theta = bases.pop() if bases else family.defaults["rope_theta"]
    if (part := settings.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"{where}: partial_rotary_factor {brief(part)} is not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    for key, value in (new or {}).items():  # programs differ in which of the two they believe
        ours = kind if key in ("rope_type", "type") else settings.get(key, value)
        if value != ours:
            raise ValueError(f"{where}: {key} is {brief(ours)} in rope_scaling and {brief(value)} in rope_parameters")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope_type '{brief(kind)}' is not supported, only default and llama3")
    original = settings.get("original_max_position_embeddings", values.get("original_max_position_embeddings"))
    settings = settings | {"original_max_position_embeddings": original}
    return theta, {
        "factor": _number(settings, "factor", where),
        "low_freq_factor": _number(settings, "low_freq_factor", where),
        "high_freq_factor": _number(settings, "high_freq_factor", where),
        "original_ctx_len": _integer(settings, "original_max_position_embeddings", where),
    }


def _read_activation(values: Mapping[str, Any], family: Family, where: str) -> Activation | None:
    name = values["hidden_act"]
    activation = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if activation is None:
        raise ValueError(f"{where}: hidden_act '{brief(name)}' is not supported, only {', '.join(_ACTIVATIONS)}")
    return None if activation == ("silu" if family.use_swiglu else "gelu") else activation


def _expert_count(values: Mapping[str, Any], family: Family, where: str) -> int:
    """The number of experts, whose key has two names: transformers 5 writes Qwen3-MoE's as num_local_experts."""
    keys = [key for key in ("num_local_experts", "num_experts") if values.get(key) is not None]
    counts = {_integer(values, key, where) for key in keys} or {_integer(family.defaults, "num_experts", where)}
    if len(counts) > 1:
        raise ValueError(f"{where}: num_local_experts and num_experts differ: {sorted(counts)}")
    return counts.pop()


def _integer(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{where}: {key} must be a whole number, found {brief(value)}")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} must be a number, found {brief(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: {key} is too large") from None


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} must be true or false, found {brief(value)}")
    return value
