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
from .huggingface_config import expressible, family_of, read_config
from .huggingface_tokenizer import read_text_files
from .model_files import ModelFiles
from .tensors import (
    Array,
    Layout,
    LazyTensors,
    Piece,
    Recipe,
    T,
    check_shapes,
    foreign_shapes,
    parameter_shapes,
    to_foreign,
    to_ours,
)

__all__ = ["expressible", "layout", "open_folder", "open_tensors", "to_huggingface"]

# What the two mixtures name differently: the block in a layer, and the parts of an expert.
_MIXTURES = {
    "mixtral": ("block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    "qwen3_moe": ("mlp", {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}),
}

# Written by old versions beside the weights, and recomputed by everyone.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def layout(config: ThinkerConfig, fused_experts: bool = False) -> Layout:
    """Where every Thinker tensor lies among the tensors of its class.

    With fused_experts under the names that transformers 5 has in memory, instead of one name per expert.
    """
    shapes = parameter_shapes(config)
    recipes: Layout = {}

    def whole(ours: str, theirs: str) -> None:
        recipes[ours] = Recipe(shapes[ours], (Piece(theirs, shapes[ours]),))

    whole("tok_emb.weight", "model.embed_tokens.weight")
    for i in range(config.n_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        whole(f"{block}.norm1.scale", f"{layer}.input_layernorm.weight")
        if config.use_gqa:
            for part in "qkv":
                whole(f"{block}.attn.{part}.weight", f"{layer}.self_attn.{part}_proj.weight")
        else:
            rows, columns = shapes[f"{block}.attn.qkv.weight"]
            third = rows // 3
            recipes[f"{block}.attn.qkv.weight"] = Recipe(
                (rows, columns),
                tuple(
                    Piece(f"{layer}.self_attn.{part}_proj.weight", (third, columns), slice(n * third, (n + 1) * third))
                    for n, part in enumerate("qkv")
                ),
            )
        if config.use_qk_norm:
            whole(f"{block}.attn.q_norm.scale", f"{layer}.self_attn.q_norm.weight")
            whole(f"{block}.attn.k_norm.scale", f"{layer}.self_attn.k_norm.weight")
        whole(f"{block}.attn.out_proj.weight", f"{layer}.self_attn.o_proj.weight")
        whole(f"{block}.norm2.scale", f"{layer}.post_attention_layernorm.weight")
        if config.use_moe:
            recipes |= _experts(config, f"{block}.moe", layer, fused_experts)
        else:
            for part in ("gate_proj", "up_proj", "down_proj") if config.use_swiglu else ("up_proj", "down_proj"):
                whole(f"{block}.mlp.{part}.weight", f"{layer}.mlp.{part}.weight")
    whole("norm.scale", "model.norm.weight")
    if not config.tie_embeddings:
        whole("head.weight", "lm_head.weight")
    return recipes


def _experts(config: ThinkerConfig, moe: str, layer: str, fused: bool) -> Layout:
    E, D, hidden = config.num_experts, config.d_model, config.d_ff
    if fused:
        mixture, both = f"{layer}.mlp", f"{layer}.mlp.experts.gate_up_proj"

        def half(first: int) -> Recipe:
            return Recipe((E, hidden, D), (Piece(both, (E, 2 * hidden, D), within=np.s_[:, first : first + hidden]),))

        down = Recipe((E, D, hidden), (Piece(f"{mixture}.experts.down_proj", (E, D, hidden)),))
        recipes = {"gate_proj": half(0), "up_proj": half(hidden), "down_proj": down}
    else:
        inner, names = _MIXTURES[family_of(config).model_type]
        mixture = f"{layer}.{inner}"
        shapes = {"gate_proj": (hidden, D), "up_proj": (hidden, D), "down_proj": (D, hidden)}
        recipes = {
            part: Recipe(
                (E, *shape),
                tuple(Piece(f"{mixture}.experts.{e}.{names[part]}.weight", shape, at=e) for e in range(E)),
            )
            for part, shape in shapes.items()
        }
    router = Recipe((E, D), (Piece(f"{mixture}.gate.weight", (E, D)),))
    return {f"{moe}.router.weight": router} | {f"{moe}.experts.{part}": recipe for part, recipe in recipes.items()}


def to_huggingface(config: ThinkerConfig, tensors: Mapping[str, T], where: str) -> LazyTensors[T]:
    """Thinker's tensors under the names of their class, as views where that is possible. layer_scale must be folded."""
    assert config.layer_scale is None, "layer_scale has no home in any class: fold it first"
    return to_foreign(layout(config), tensors, where)


def open_tensors(config: ThinkerConfig, weights: Weights, where: str) -> LazyTensors[Array]:
    """Thinker's tensors over a folder's weights, once every name and shape agrees with the configuration."""
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in weights)
    # A configuration from elsewhere may promise any number: no table is made that is longer than the file.
    promised = config.n_layers * (config.num_experts if config.use_moe and not fused else 1)
    if promised > len(weights):
        parts = "experts" if config.use_moe and not fused else "layers"
        raise ValueError(f"{where}: its configuration has {promised} {parts}, its weights only {len(weights)} tensors")
    recipes = layout(config, fused)
    ignored = {name for name in weights if _RECOMPUTED.fullmatch(name)}
    if config.tie_embeddings:  # some files carry the embedding a second time; transformers takes the first
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
