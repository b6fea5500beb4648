"""Hugging Face folders, both ways: the one table of names for five classes, and opening such a folder.

The table serves writing and reading. Keys of `config.json` are in `huggingface_config.py`, what belongs to text in
`huggingface_tokenizer.py`, writing a run's view of itself in `checkpoint/publish.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..checkpoint.files import read_json
from ..checkpoint.reader import Weights, read_weights
from ..config import ThinkerConfig
from .huggingface_config import expressible, read_config
from .huggingface_tokenizer import read_text_files
from .model_files import ModelFiles
from .tensors import (
    Array,
    Layout,
    LazyTensors,
    Piece,
    Recipe,
    T,
    build_layout,
    check_shapes,
    foreign_shapes,
    to_foreign,
    to_ours,
)

__all__ = ["expressible", "layout", "open_folder", "open_tensors", "to_huggingface"]

_LAYER = "model.layers.{i}."
_NAMES = {
    "tok_emb.weight": "model.embed_tokens.weight",
    "norm1.scale": _LAYER + "input_layernorm.weight",
    "attn.q.weight": _LAYER + "self_attn.q_proj.weight",
    "attn.k.weight": _LAYER + "self_attn.k_proj.weight",
    "attn.v.weight": _LAYER + "self_attn.v_proj.weight",
    "attn.q_norm.scale": _LAYER + "self_attn.q_norm.weight",
    "attn.k_norm.scale": _LAYER + "self_attn.k_norm.weight",
    "attn.out_proj.weight": _LAYER + "self_attn.o_proj.weight",
    "norm2.scale": _LAYER + "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": _LAYER + "mlp.gate_proj.weight",
    "mlp.up_proj.weight": _LAYER + "mlp.up_proj.weight",
    "mlp.down_proj.weight": _LAYER + "mlp.down_proj.weight",
    "moe.router.weight": _LAYER + "mlp.gate.weight",
    "moe.experts.gate_proj": _LAYER + "mlp.experts.{e}.gate_proj.weight",
    "moe.experts.up_proj": _LAYER + "mlp.experts.{e}.up_proj.weight",
    "moe.experts.down_proj": _LAYER + "mlp.experts.{e}.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_MIXTRAL = _NAMES | {
    "moe.router.weight": _LAYER + "block_sparse_moe.gate.weight",
    "moe.experts.gate_proj": _LAYER + "block_sparse_moe.experts.{e}.w1.weight",
    "moe.experts.up_proj": _LAYER + "block_sparse_moe.experts.{e}.w3.weight",
    "moe.experts.down_proj": _LAYER + "block_sparse_moe.experts.{e}.w2.weight",
}
# What transformers 5 has in memory for both mixtures, and writes on request: gate above up in one tensor.
_GATE_UP = _LAYER + "mlp.experts.gate_up_proj"
_FUSED = _NAMES | {
    "moe.experts.gate_proj": _GATE_UP,
    "moe.experts.up_proj": _GATE_UP,
    "moe.experts.down_proj": _LAYER + "mlp.experts.down_proj",
}

# Written by old versions beside the weights, and recomputed by everyone.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def layout(config: ThinkerConfig, fused_experts: bool = False) -> Layout:
    """Where every Thinker tensor lies among the tensors of its class.

    With fused_experts as transformers 5 has the experts in memory, instead of one name per expert.
    """
    if not fused_experts:
        return build_layout(config, _MIXTRAL if config.use_moe and not config.use_qk_norm else _NAMES)
    recipes = build_layout(config, _FUSED)
    E, D, hidden = config.num_experts, config.d_model, config.d_ff
    for i in range(config.n_layers):
        for part, first in (("gate_proj", 0), ("up_proj", hidden)):
            half = Piece(_GATE_UP.format(i=i), (E, 2 * hidden, D), within=np.s_[:, first : first + hidden])
            recipes[f"blocks.{i}.moe.experts.{part}"] = Recipe((E, hidden, D), (half,))
    return recipes


def to_huggingface(config: ThinkerConfig, tensors: Mapping[str, T], where: str) -> LazyTensors[T]:
    """Thinker's tensors under the names of their class, as views where that is possible. layer_scale must be folded."""
    assert config.layer_scale is None, "layer_scale has no home in any class: fold it first"
    return to_foreign(layout(config), tensors, where)


def open_tensors(config: ThinkerConfig, weights: Weights, where: str) -> LazyTensors[Array]:
    """Thinker's tensors over a folder's weights, once every name and shape agrees with the configuration."""
    fused = config.use_moe and any(name.endswith(".mlp.experts.gate_up_proj") for name in weights)
    # A configuration from elsewhere may promise any number: no table is made that is longer than the file.
    each, what = (config.num_experts, "experts") if config.use_moe and not fused else (1, "layers")
    if (promised := config.n_layers * each) > len(weights):
        raise ValueError(f"{where}: its configuration has {promised} {what}, its weights only {len(weights)} tensors")
    recipes = layout(config, fused)
    ignored = {name for name in weights if _RECOMPUTED.fullmatch(name)}
    if config.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(weights):
        # Some files carry the embedding twice. If they differ, transformers 4 and 5 disagree about what is meant.
        if not np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise ValueError(f"{where}: lm_head.weight is not the embedding, so set tie_word_embeddings to false")
        ignored.add("lm_head.weight")
    found = {name: weights.shape(name) for name in weights if name not in ignored}
    if "lm_head.weight" not in found and not config.tie_embeddings:
        raise ValueError(f"{where}: lm_head.weight is missing, and tie_word_embeddings is not true")
    check_shapes(foreign_shapes(recipes), found, where)
    for name in found:
        if weights.dtype(name).kind != "f" and weights.dtype(name).name != "bfloat16":
            raise ValueError(f"{where}: {name} has type {weights.dtype(name)}; Thinker opens floating-point weights")
    return to_ours(recipes, weights.__getitem__, where)


def open_folder(folder: Path) -> ModelFiles:
    """A folder that any program wrote: `config.json`, safetensors, and the tokenizer's files if there are any."""
    values = read_json(folder / "config.json")
    config = read_config(values, str(folder / "config.json"))
    weights = read_weights(folder)
    tensors = open_tensors(config, weights, str(folder))
    return ModelFiles(
        config=config,
        tensors=tensors,
        path=folder,
        dtype=weights.dtype("model.embed_tokens.weight").name,
        **read_text_files(folder, values, config.vocab_size),
    )
