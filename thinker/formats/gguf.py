"""GGUF files of four architectures: the one table of names for both directions, and opening such a file.

The container is in `gguf_file.py`, settings in `gguf_config.py`, the vocabulary in `gguf_tokenizer.py`, writing in
`gguf_export.py`. Rows of q and k lie in another order where llama.cpp turns neighbouring dimensions instead of halves.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from ..checkpoint.files import brief
from ..config import ThinkerConfig
from .gguf_config import ROPE_FACTORS, Architecture, read_config, recognise_scaling
from .gguf_file import GGUFFile
from .gguf_sentencepiece import sentencepiece_json
from .gguf_tokenizer import WAYS, read_tokens, read_vocabulary, to_tokenizer_json
from .model_files import ModelFiles
from .tensors import Array, Layout, build_layout, check_shapes, foreign_shapes, to_ours

_NAMES = {
    "tok_emb.weight": "token_embd.weight",
    "norm1.scale": "blk.{i}.attn_norm.weight",
    "attn.q.weight": "blk.{i}.attn_q.weight",
    "attn.k.weight": "blk.{i}.attn_k.weight",
    "attn.v.weight": "blk.{i}.attn_v.weight",
    "attn.q_norm.scale": "blk.{i}.attn_q_norm.weight",
    "attn.k_norm.scale": "blk.{i}.attn_k_norm.weight",
    "attn.out_proj.weight": "blk.{i}.attn_output.weight",
    "norm2.scale": "blk.{i}.ffn_norm.weight",
    "mlp.gate_proj.weight": "blk.{i}.ffn_gate.weight",
    "mlp.up_proj.weight": "blk.{i}.ffn_up.weight",
    "mlp.down_proj.weight": "blk.{i}.ffn_down.weight",
    "moe.router.weight": "blk.{i}.ffn_gate_inp.weight",
    "moe.experts.gate_proj": "blk.{i}.ffn_gate_exps.weight",
    "moe.experts.up_proj": "blk.{i}.ffn_up_exps.weight",
    "moe.experts.down_proj": "blk.{i}.ffn_down_exps.weight",
    "norm.scale": "output_norm.weight",
    "head.weight": "output.weight",
}
_DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}


def layout(config: ThinkerConfig) -> Layout:
    """Where every Thinker tensor lies among the tensors of a GGUF file, apart from the order of q's and k's rows."""
    return build_layout(config, _NAMES)


def row_orders(config: ThinkerConfig, arch: Architecture) -> dict[str, np.ndarray]:
    """For q and k of each layer the row of Thinker's that stands at each row of the file.

    Halves to neighbours: within a head of width 4 the file has rows 0, 2, 1, 3 of ours, since dimension i turns
    together with i + 2 here, and with i + 1 there.
    """
    if not arch.neighbours:
        return {}

    def order(heads: int) -> np.ndarray:
        rows = np.arange(heads * config.head_width).reshape(heads, 2, config.head_width // 2)
        return rows.swapaxes(1, 2).reshape(-1)

    orders = {"q": order(config.n_heads), "k": order(config.n_kv_heads)}
    return {f"blk.{i}.attn_{part}.weight": rows for i in range(config.n_layers) for part, rows in orders.items()}


def open_gguf(path: Path) -> ModelFiles:
    """Open a GGUF file of one of the architectures. What Thinker can't compute raises `ValueError` by name."""
    file = GGUFFile(path)
    config, arch = read_config(file)
    found = {name: entry.shape for name, entry in file.entries.items()}
    if arch.neighbours and ROPE_FACTORS in found:
        factors = file.tensor(ROPE_FACTORS)
        del found[ROPE_FACTORS]
        config = config.changed(rope_scaling=recognise_scaling(factors, config, file))
    recipes = layout(config)
    check_shapes(foreign_shapes(recipes), found, str(path))
    orders = {name: np.argsort(rows) for name, rows in row_orders(config, arch).items()}

    def read(name: str) -> Array:
        tensor = file.tensor(name)
        return tensor[orders[name]] if name in orders else tensor

    return ModelFiles(
        config=config,
        tensors=to_ours(recipes, read, str(path)),
        path=path,
        dtype=_commonest_type(file),
        **_read_text(file, config.vocab_size),
    )


def _commonest_type(file: GGUFFile) -> str:
    sizes: Counter[GGMLQuantizationType] = Counter()
    for entry in file.entries.values():
        sizes[entry.kind] += entry.nbytes
    kind = sizes.most_common(1)[0][0]
    return _DTYPES.get(kind, kind.name)


def _read_text(file: GGUFFile, vocab_size: int) -> dict[str, Any]:
    """The fields of `ModelFiles` that belong to text. A file without vocabulary opens without tokenizer."""
    kind = file.scalar("tokenizer.ggml.model")
    if kind in (None, "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise file.fail(f"tokenizer.ggml.model '{brief(kind)}' is not supported, only gpt2 and llama")
    if (n_tokens := len(read_tokens(file)[0])) != vocab_size:
        raise file.fail(f"its tokenizer has {n_tokens} tokens, its embedding {vocab_size} rows")
    if kind == "gpt2":
        vocabulary = read_vocabulary(file)
        text, add_bos = to_tokenizer_json(vocabulary, str(file.path)), WAYS[vocabulary.pre].add_bos
    else:
        text, add_bos = sentencepiece_json(file), True

    def special(kind: str) -> int | None:
        value = file.scalar(f"tokenizer.ggml.{kind}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    ends = dict.fromkeys(special(kind) for kind in ("eos", "eot", "eom"))
    bos, template = special("bos"), file.scalar("tokenizer.chat_template")
    if (said := file.scalar("tokenizer.ggml.add_bos_token")) is not None:
        add_bos = said is True
    return {
        "tokenizer_json": text,
        "chat_template": template if isinstance(template, str) else None,
        "bos_id": bos,
        "eos_ids": tuple(number for number in ends if number is not None),
        "pad_id": special("padding"),
        "add_bos": add_bos and bos is not None,
    }
