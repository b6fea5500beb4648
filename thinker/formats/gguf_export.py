"""Writing GGUF files for llama.cpp, with gguf-py: F32, F16, BF16 and Q8_0, tokenizer and chat template included.

What GGUF or llama.cpp can't carry is said before anything is written; a file appears whole or not at all. Names are in
`gguf.py`, settings in `gguf_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from ..checkpoint.files import replacing
from ..checkpoint.reader import all_finite, widen
from ..config import ThinkerConfig
from .gguf import layout, row_orders
from .gguf_config import ARCHITECTURES, ROPE_FACTORS, Architecture, rope_factors, write_config
from .gguf_tokenizer import Vocabulary, to_vocabulary
from .model_files import ModelFiles
from .q8 import BLOCK, Q8Tensor
from .tensors import Array, foreign_shapes, to_foreign

ExportType = Literal["f32", "f16", "bf16", "q8_0"]
_KINDS: dict[ExportType, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_FILE_TYPES: dict[ExportType, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
LARGEST = 512  # layers, and experts: llama.cpp's arrays hold no more


def exportable(config: ThinkerConfig, kind: ExportType = "f32") -> str | None:
    """None when llama.cpp computes this network and can store it as `kind`, otherwise the reason why not."""
    activation, shapes = config.activation_name, foreign_shapes(layout(config.changed(layer_scale=None)))
    uneven = [name for name, shape in shapes.items() if _stored(name, shape, kind) == "q8_0" and shape[-1] % BLOCK]
    if config.layer_scale is not None:
        return "layer_scale must be folded first: export the published model"
    if not config.use_swiglu and config.use_qk_norm:
        return "llama.cpp has no architecture with the plain MLP and QK-norm"
    if config.use_swiglu and activation != "silu":
        return f"llama.cpp computes silu in the gate whatever the file says, and this model's is {activation}"
    if not config.use_swiglu and activation != "relu2":
        return f"llama.cpp computes the plain MLP with relu2 (arcee) alone, and this model's is {activation}"
    if config.rope_scaling is not None and config.use_qk_norm:
        return "llama.cpp's qwen3 has no rope scaling of Llama 3's kind"
    if config.n_layers > LARGEST or (config.use_moe and config.num_experts > LARGEST):
        return f"llama.cpp holds at most {LARGEST} layers and {LARGEST} experts"
    if uneven:
        width = shapes[uneven[0]][-1]
        return f"Q8_0 cuts rows into blocks of {BLOCK}, and {uneven[0]} has rows of {width}: choose f16, bf16 or f32"
    return None


def check_exportable(files: ModelFiles, kind: ExportType) -> Vocabulary:
    """The vocabulary that a file will have; what GGUF or llama.cpp can't carry of a model raises `ValueError`."""
    if kind not in get_args(ExportType):
        raise ValueError(f"type {kind!r} can't be exported: choose {', '.join(get_args(ExportType))}")
    if (reason := exportable(files.config, kind)) is not None:
        raise ValueError(f"{files.path}: {reason}")
    if files.modality is not None:
        senses = " and ".join(files.modality.config.kinds)
        raise ValueError(
            f"{files.path}: its encoders and projectors for {senses} have no place in GGUF: "
            "export what it knows of text alone with --text-only"
        )
    if files.tokenizer_json is None:
        raise ValueError(f"{files.path}: has no tokenizer.json, without which llama.cpp can't read or write text")
    vocabulary = to_vocabulary(files.tokenizer_json, files.config.vocab_size, str(files.path))
    if len(files.eos_ids) > 3:
        raise ValueError(f"{files.path}: {len(files.eos_ids)} tokens end its texts, and GGUF has room for 3")
    return vocabulary


def export_gguf(
    files: ModelFiles, path: Path, kind: ExportType = "f16", progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a model as a GGUF file, atomically. What GGUF or llama.cpp can't carry raises `ValueError` beforehand.

    Q8_0 tensors of the model stay as they are under "q8_0". `progress` gets the tensors done and their number.
    """
    vocabulary = check_exportable(files, kind)
    config = files.config
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    arch = next(arch for arch in ARCHITECTURES.values() if _fits(arch, config))
    recipes, orders = layout(config), row_orders(config, arch)
    tensors: Mapping[str, Array] = to_foreign(recipes, files.tensors, str(files.path))
    stored = {name: (shape, _KINDS[_stored(name, shape, kind)]) for name, shape in foreign_shapes(recipes).items()}
    if config.rope_scaling is not None:
        stored = {ROPE_FACTORS: ((config.head_width // 2,), GGMLQuantizationType.F32)} | stored
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, arch.name)
        try:
            _write_about(writer, files, kind)
            write_config(writer, config)
            _write_text(writer, files, vocabulary)
            for name, (shape, raw) in stored.items():
                values_per_block, bytes_per_block = GGML_QUANT_SIZES[raw]
                nbytes = math.prod(shape) // values_per_block * bytes_per_block
                writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw)
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (name, (_, raw)) in enumerate(stored.items()):
                if progress is not None:
                    progress(done, len(stored))
                tensor = rope_factors(config) if name == ROPE_FACTORS else tensors[name]
                tensor = tensor[orders[name]] if name in orders else tensor
                writer.write_tensor_data(_encode(tensor, raw, f"{files.path}: {name}"))
        finally:
            writer.close()


def _fits(arch: Architecture, config: ThinkerConfig) -> bool:
    moe = arch.may_moe if config.use_moe else not arch.needs_moe
    return moe and (arch.use_swiglu, arch.use_qk_norm) == (config.use_swiglu, config.use_qk_norm)


def _stored(name: str, shape: tuple[int, ...], kind: ExportType) -> ExportType:
    """Norms and routers stay in float32: they are small, and much hangs on them."""
    return "f32" if len(shape) == 1 or name.endswith("ffn_gate_inp.weight") else kind


def _encode(tensor: Array, kind: GGMLQuantizationType, where: str) -> np.ndarray:
    if kind == GGMLQuantizationType.Q8_0:
        q8 = tensor if isinstance(tensor, Q8Tensor) else _quantise(tensor, where)
        blocks = np.empty((*q8.scales.shape, 2 + BLOCK), np.uint8)
        blocks[..., :2] = np.ascontiguousarray(q8.scales).astype("<f2")[..., None].view(np.uint8)
        blocks[..., 2:] = q8.quants.reshape(*q8.scales.shape, BLOCK).view(np.uint8)
        return blocks
    wide = np.asarray(tensor)
    if kind == GGMLQuantizationType.F32:
        return np.ascontiguousarray(widen(wide))
    if kind == GGMLQuantizationType.BF16:
        return np.ascontiguousarray(wide.astype(ml_dtypes.bfloat16)).view(np.uint16)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if not all_finite(narrow):
        raise ValueError(f"{where} has values beyond float16's range: choose bf16 or f32")
    return np.ascontiguousarray(narrow)


def _quantise(tensor: np.ndarray, where: str) -> Q8Tensor:
    try:
        return Q8Tensor.quantise(tensor)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _write_about(writer: GGUFWriter, files: ModelFiles, kind: ExportType) -> None:
    writer.add_type("model")
    writer.add_name(files.path.stem or "thinker")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)


def _write_text(writer: GGUFWriter, files: ModelFiles, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    if files.bos_id is not None:
        writer.add_bos_token_id(files.bos_id)
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for number, add in zip(files.eos_ids, ends, strict=False):
        add(number)
    if files.pad_id is not None:
        writer.add_pad_token_id(files.pad_id)
    # Said either way: llama.cpp's default hangs on the name of the pre-tokenizer.
    writer.add_add_bos_token(files.add_bos and files.bos_id is not None)
    if files.chat_template is not None:
        writer.add_chat_template(files.chat_template)
