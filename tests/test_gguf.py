"""Proofs of GGUF both ways: gguf-py and transformers are the judges, and nothing malformed gets in."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ARCHITECTURES, small
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from test_training_state import parameters

from thinker.checkpoint.reader import widen
from thinker.config import RopeScaling, ThinkerConfig
from thinker.formats import Modality, ModelFiles, Q8Tensor, open_model
from thinker.formats.gguf_export import ExportType, export_gguf, exportable
from thinker.formats.gguf_file import TYPES, GGUFFile
from thinker.formats.gguf_tokenizer import WAYS, Vocabulary, to_tokenizer_json, to_vocabulary
from thinker.formats.huggingface_config import disagreement
from thinker.modality.settings import SensesConfig
from thinker.rope import rope_tables
from thinker.tokenizer import SPECIAL_TOKENS, Tokenizer

AWKWARD = (
    "",
    " ",
    "  two  spaces ",
    "tab\tand\r\nnewlines\n\n\n end",
    "I'm, you're; they'LL",
    "1234567 3.14 ²½ ٣",
    "naïve 中文字 日本語 🙂👩‍👩‍👧 é",
    "def f(x):\n    return x**2  # <|eos|> [PAD3]",
    "<|pad|><|user|>hello<|end|>",
    "a\u00a0b\u200bc\u3000d",
)
EXPORTED = [name for name in ARCHITECTURES if exportable(small(name)) is None]
CORPUS = ["def function(argument):\n    return argument + 12345\n", "naïve 中文 and words, words, words 🙂\n"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 340)


def model_files(config: ThinkerConfig, tokenizer: Tokenizer | None = None, **fields: Any) -> ModelFiles:
    """A model of random parameters as if it had been opened."""
    text = None if tokenizer is None else tokenizer.to_json()
    special = {"bos_id": 1, "eos_ids": (2, 6), "pad_id": 0, "add_bos": True, "chat_template": "{{ messages }}"}
    values = {"tensors": parameters(config), "path": Path("model"), "dtype": "float32", "tokenizer_json": text}
    return ModelFiles(config=config, **(special | values | fields))


# --- Q8_0 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (5000, 96), (3, 7, 64), (32,)])
def test_rounds_as_ggml_does(shape: tuple[int, ...]) -> None:
    """Catches a scale rounded before it divides, halves rounded to even, and rows mixed up between chunks."""
    draws = np.random.default_rng(0)
    array = (draws.standard_normal(shape) * 10.0 ** draws.uniform(-6, 3, (*shape[:-1], 1))).astype(np.float32)
    array.reshape(-1)[:32] = 0
    array.reshape(-1, 32)[-1] = np.append(np.arange(-15, 16) + 0.5, 127)  # a scale of 1, and halves
    found = Q8Tensor.quantise(array)
    judged = gguf.quantize(array, GGMLQuantizationType.Q8_0).reshape(*shape[:-1], -1, 34)
    assert np.array_equal(found.scales.view(np.uint8), judged[..., :2].reshape(*found.scales.shape[:-1], -1))
    assert np.array_equal(found.quants.reshape((*judged.shape[:-1], 32)).view(np.uint8), judged[..., 2:])
    blocks = judged.reshape(*shape[:-1], -1)
    assert np.array_equal(widen(found), gguf.dequantize(blocks, GGMLQuantizationType.Q8_0))
    assert found.shape == array.shape
    # An eight-bit grid: half a step of max / 127, and the scale's own rounding to 11 bits.
    limit = np.abs(array.reshape(-1, 32)).max(axis=1, keepdims=True) * (0.5 / 127 + 2.0**-11) + 2.0**-24 * 128
    assert np.all(np.abs(widen(found) - array).reshape(-1, 32) <= limit)


def test_rounding_again_changes_nothing() -> None:
    """Catches a second loss each time a quantised model is exported."""
    array = np.random.default_rng(0).standard_normal((64, 96)).astype(ml_dtypes.bfloat16)
    once = Q8Tensor.quantise(array)
    part = once[3:5]
    assert np.array_equal(widen(part), widen(once)[3:5])
    assert np.array_equal(widen(once[[5, 3]]), widen(once)[[5, 3]])


@pytest.mark.parametrize(("array", "reason"), [(np.ones((2, 33)), "33"), (np.ones(()), "0"), (np.full(32, 1e8), "1e")])
def test_what_has_no_blocks_is_refused(array: np.ndarray, reason: str) -> None:
    """Catches a row cut into blocks that reach into the next one, and infinite scales."""
    with pytest.raises(ValueError, match=reason):
        Q8Tensor.quantise(array.astype(np.float32))


# --- the container ----------------------------------------------------------------------------------------------------


def write_container(path: Path) -> None:
    """A small file with every kind of value."""
    writer = GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"n.{kind}", 100)
    writer.add_float32("n.float32", 1e-6)
    writer.add_float64("n.float64", -2.5)
    writer.add_bool("n.bool", True)
    writer.add_string("n.string", "héllo")
    writer.add_array("a.strings", ["a", "", "ü"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.add_tensor("three", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reads_what_gguf_reads(tmp_path: Path) -> None:
    """Catches a type of value or a tensor's place that is read differently from gguf-py."""
    path = tmp_path / "a.gguf"
    write_container(path)
    ours, judged = GGUFFile(path), GGUFReader(path)
    for key, field in judged.fields.items():
        if key.startswith("GGUF."):
            continue
        value = ours.fields[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
    assert set(ours.entries) == {tensor.name for tensor in judged.tensors}
    for tensor in judged.tensors:
        assert np.array_equal(widen(ours.tensor(tensor.name)), tensor.data), tensor.name
        assert not widen(ours.tensor(tensor.name)).flags.writeable or tensor.name == "two"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_gguf_does(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Catches blocks of one type read with the size or order of another."""
    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
    draws = np.random.default_rng(0)
    raw = draws.integers(0, 60, (3, 2 * 256 // values_per_block * bytes_per_block), dtype=np.uint8)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "a.gguf").tensor("t")
    assert found.shape == (3, 512)
    assert np.array_equal(widen(found), gguf.dequantize(raw, kind))
    assert isinstance(found, Q8Tensor) == (kind == GGMLQuantizationType.Q8_0)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def container(
    fields: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"\0" * 16,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file from its parts, with counts that may lie."""
    fields, infos = fields or [], [info()] if infos is None else infos
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(fields))))
    body = head + b"".join(fields) + b"".join(infos)
    return body + b"\0" * (-len(body) % 32) + data


TAMPERED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "no magic": (b"GGML" + b"\0" * 40, "doesn't begin with GGUF"),
    "version 1": (container(version=1), "version 1 is not supported"),
    "other byte order": (container(version=3 << 24), "other byte order"),
    "endless tensors": (container(counts=(2**60, 0)), "too many"),
    "endless fields": (container(counts=(1, 2**60)), "too many"),
    "one field too many": (container(counts=(1, 1)), "0 dimensions"),
    "endless key": (container([struct.pack("<Q", 2**62)]), "a key needs"),
    "key not UTF-8": (container([string(b"\xff\xfe") + struct.pack("<IB", 0, 0)]), "not UTF-8"),
    "unknown type": (container([field("a", 13, b"")]), "unknown type 13"),
    "key twice": (container([field("a", 0, b"\0"), field("a", 0, b"\0")]), "stands twice"),
    "endless string": (container([field("a", 8, struct.pack("<Q", 2**40))]), "needs"),
    "endless array": (container([field("a", 9, struct.pack("<IQ", 4, 2**61))]), "needs"),
    "endless strings": (container([field("a", 9, struct.pack("<IQ", 8, 2**61))]), "claims"),
    "array of arrays": (container([field("a", 9, struct.pack("<IQ", 9, 1))]), "not supported"),
    "no dimensions": (container(infos=[info(dims=())]), "0 dimensions"),
    "many dimensions": (container(infos=[info(dims=(1,) * 5)]), "5 dimensions"),
    "empty tensor": (container(infos=[info(dims=(0,))]), "can't have the shape"),
    "sizes that overflow": (container(infos=[info(dims=(2**63, 2**63, 4))]), "can't have the shape"),
    "product wraps to right": (container(infos=[info(dims=(2**32 + 1, 2**32, 4))]), "can't have the shape"),
    "rows no whole blocks": (container(infos=[info(dims=(16,), kind=8)]), "can't have the shape"),
    "unsupported type": (container(infos=[info(kind=16)]), "type IQ2_XXS, which is not among"),
    "unknown tensor type": (container(infos=[info(kind=999)]), "type 999"),
    "tensor twice": (container(infos=[info(), info(offset=32)], data=b"\0" * 64), "stands twice"),
    "offset beyond": (container(infos=[info(offset=2**63)]), "begins at byte"),
    "offset unaligned": (container(infos=[info(offset=4)], data=b"\0" * 32), "begins at byte"),
    "overlap": (container(infos=[info(), info("u")], data=b"\0" * 64), "begins at byte"),
    "data missing": (container(data=b"\0" * 15), "truncated or tampered"),
    "data left over": (container(data=b"\0" * 64), "truncated or tampered"),
    "alignment 0": (container([field("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
    "alignment 24": (container([field("general.alignment", 4, struct.pack("<I", 24))]), "alignment"),
    "alignment a string": (container([field("general.alignment", 8, string("32"))]), "alignment"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_files_give_one_line(tmp_path: Path, case: str) -> None:
    """Catches a check of counts, lengths, offsets or types that was left out; each line names the file."""
    path, (content, reason) = tmp_path / "evil.gguf", TAMPERED[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_untampered_file_is_read(tmp_path: Path) -> None:
    """Catches checks so strict that the cases above would fail for a reason of their own."""
    path = tmp_path / "good.gguf"
    path.write_bytes(container([field("general.alignment", 4, struct.pack("<I", 32))]))
    assert widen(GGUFFile(path).tensor("t")).tolist() == [0, 0, 0, 0]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Catches a download that broke off and is read as a smaller model."""
    whole, path = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_container(whole)
    content = whole.read_bytes()
    for length in range(len(content) - 31):  # the last bytes may be padding, which some writers leave out
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GGUFFile(path)


FUZZ = """
import random, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_gguf import CORPUS, Tokenizer, export_gguf, model_files, small, widen
from thinker.formats import open_model

path = Path(sys.argv[1])
tokenizer = Tokenizer.train(CORPUS, 290)
files = model_files(small("dense", vocab_size=tokenizer.vocab_size, n_layers=1, d_ff=64), tokenizer)
export_gguf(files, path, "q8_0")
content, draws = path.read_bytes(), random.Random(0)
settings = content.index(b"tokenizer.ggml.tokens")
infos = content.index(b"token_embd.weight")
numbers = [(n).to_bytes(8, "little") for n in (0, 1, 2, 31, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)]
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
outcomes = {"read": 0, "refused": 0}
for _ in range(int(sys.argv[2])):
    mutated = bytearray(content)
    for _ in range(draws.randint(1, 3)):
        place = draws.choice((
            draws.randrange(24), draws.randrange(24, settings), draws.randrange(24, settings),
            draws.randrange(infos - 300, infos), draws.randrange(infos, infos + 900), draws.randrange(len(mutated)),
        ))
        match draws.randrange(5):
            case 0: mutated[place] = draws.randrange(256)
            case 1: mutated[place:place + 4] = draws.choice(numbers)[:4]
            case 2: mutated[place:place + 8] = draws.choice(numbers)
            case 3: del mutated[place:place + draws.choice((1, 4, 8, 40, 400))]
            case 4: mutated[place:place] = mutated[place:place + draws.randint(1, 40)]
    path.write_bytes(mutated)
    try:
        files = open_model(path)
        for name in files.tensors:
            widen(files.tensors[name]).sum()
        outcomes["read"] += 1
    except ValueError as error:
        assert str(path) in str(error) and "\\n" not in str(error), error
        outcomes["refused"] += 1
print(outcomes["read"], outcomes["refused"])
"""


def test_fuzzed_files_raise_nothing_but_value_error(tmp_path: Path) -> None:
    """Catches a crash, an endless loop or allocation (2 GiB is the limit), or another exception on 2,000 files."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        FUZZ,
        str(tmp_path / "fuzz.gguf"),
        "2000",
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split())
    assert refused > 500, "the mutations hardly reach anything"
    assert read > 10, "not even a mutated weight is read: the fuzzing itself is broken"


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", EXPORTED, indirect=True)
def test_comes_back_bit_for_bit(tmp_path: Path, config: ThinkerConfig, tokenizer: Tokenizer) -> None:
    """Catches a row of q or k in the wrong place, a tensor misnamed, and a setting lost."""
    files = model_files(config.changed(vocab_size=350), tokenizer)
    export_gguf(files, tmp_path / "a.gguf", "f32")
    found = open_model(tmp_path / "a.gguf")
    assert disagreement(found.config, files.config) is None
    assert set(found.tensors) == set(files.tensors)
    for name, array in files.tensors.items():
        assert widen(found.tensors[name]).tobytes() == widen(array).tobytes(), name
    for key in ("bos_id", "eos_ids", "pad_id", "add_bos", "chat_template", "dtype"):
        assert getattr(found, key) == getattr(files, key), key


@pytest.mark.parametrize("config", ["dense", "gqa", "plain_relu2", "gqa_qk_norm", "wide_heads"], indirect=True)
def test_scores_are_the_same_under_llama_cpps_rope(tmp_path: Path, config: ThinkerConfig, tokenizer: Tokenizer) -> None:
    """Catches q and k in an order that llama.cpp turns wrongly: gibberish after some twenty tokens.

    Computed by hand: llama and arcee turn dimensions 2i and 2i + 1 of a head together, qwen3 i and i + width / 2.
    """
    files = model_files(config.changed(vocab_size=350), tokenizer)
    export_gguf(files, tmp_path / "a.gguf", "f32")
    file = GGUFFile(tmp_path / "a.gguf")
    width, T = config.head_width, 9
    x = np.random.default_rng(0).standard_normal((T, config.d_model))
    cos, sin = rope_tables(config, T)

    def turned(weight: np.ndarray, neighbours: bool) -> np.ndarray:
        heads = (x @ weight.T.astype(np.float64)).reshape(T, -1, width)
        pairs = (
            heads.reshape(T, -1, width // 2, 2) if neighbours else heads.reshape(T, -1, 2, width // 2).swapaxes(2, 3)
        )
        first, second = pairs[..., 0], pairs[..., 1]
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        return np.stack([first * c - second * s, first * s + second * c], axis=-1).reshape(T, -1, width)

    def scores(q: np.ndarray, k: np.ndarray, neighbours: bool) -> np.ndarray:
        turned_q, turned_k = turned(q, neighbours), turned(k, neighbours)
        return np.einsum("thw,shw->hts", turned_q, turned_k.repeat(config.n_heads // config.n_kv_heads, axis=1))

    if config.use_gqa:
        ours = [files.tensors[f"blocks.1.attn.{part}.weight"] for part in "qk"]
    else:
        ours = np.split(files.tensors["blocks.1.attn.qkv.weight"], 3)[:2]
    theirs = [widen(file.tensor(f"blk.1.attn_{part}.weight")) for part in "qk"]
    neighbours = file.fields["general.architecture"] in ("llama", "arcee")
    assert neighbours != config.use_qk_norm
    expected = scores(*ours, neighbours=False)
    assert np.allclose(scores(*theirs, neighbours=neighbours), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("config", ["dense", "gqa", "moe_gqa_qk_norm", "tied"], indirect=True)
def test_narrow_types_hold_what_they_can(
    tmp_path: Path, config: ThinkerConfig, tokenizer: Tokenizer, kind: ExportType
) -> None:
    """Catches norms or routers rounded, and rounding twice on the way through a second file."""
    files = model_files(config.changed(vocab_size=350, d_ff=64), tokenizer)
    export_gguf(files, tmp_path / "a.gguf", kind)
    found = open_model(tmp_path / "a.gguf")
    assert found.dtype == {"f16": "float16", "bf16": "bfloat16", "q8_0": "Q8_0"}[kind]
    for name, array in files.tensors.items():
        kept = array.ndim == 1 or "router" in name
        if kept:
            expected = array
        elif kind == "q8_0":
            assert isinstance(found.tensors[name], Q8Tensor), name
            expected = widen(Q8Tensor.quantise(array))
        else:
            expected = array.astype(np.float16 if kind == "f16" else ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(widen(found.tensors[name]), expected), name
    export_gguf(replace(found, path=files.path), tmp_path / "b.gguf", kind)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_gguf_py_finds_the_settings_llama_cpp_asks_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches a key that llama.cpp needs and doesn't find, or reads in another type."""
    config = small("moe_gqa_qk_norm", vocab_size=350)
    export_gguf(model_files(config, tokenizer), tmp_path / "a.gguf", "f16")
    fields = {key: value.contents() for key, value in GGUFReader(tmp_path / "a.gguf").fields.items()}
    expected = {
        "general.architecture": "qwen3moe",
        "general.file_type": 1,
        "qwen3moe.block_count": 3,
        "qwen3moe.context_length": 48,
        "qwen3moe.embedding_length": 32,
        "qwen3moe.feed_forward_length": 48,
        "qwen3moe.expert_feed_forward_length": 48,
        "qwen3moe.expert_count": 8,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 8,
        "qwen3moe.attention.value_length": 8,
        "qwen3moe.rope.dimension_count": 8,
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.vocab_size": 350,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: fields.get(key) for key in expected} == expected
    types = fields["tokenizer.ggml.token_type"]
    n_special = len(SPECIAL_TOKENS)
    assert types[:n_special] == [3] * n_special
    assert set(types[n_special : tokenizer.vocab_size]) == {1}
    assert types[tokenizer.vocab_size :] == [5] * (350 - tokenizer.vocab_size)
    export_gguf(model_files(config, tokenizer, add_bos=False), tmp_path / "b.gguf", "f16")
    fields = {key: value.contents() for key, value in GGUFReader(tmp_path / "b.gguf").fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] is False, "left out, llama.cpp decides by the pre-tokenizer"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "gelu"}, "silu in the gate whatever the file says, and this model's is gelu"),
        ({"use_swiglu": False}, "relu2 .arcee. alone, and this model's is gelu"),
        ({"use_swiglu": False, "activation": "relu2", "use_qk_norm": True}, "plain MLP and QK-norm"),
        ({"layer_scale": 0.1}, "layer_scale must be folded first"),
        ({"use_qk_norm": True, "rope_scaling": RopeScaling(factor=4.0, original_ctx_len=24)}, "no rope scaling"),
        ({"use_moe": True, "num_experts": 513}, "at most 512"),
    ],
)
def test_what_gguf_cannot_carry_is_refused_first(
    tmp_path: Path, changes: dict[str, Any], reason: str, tokenizer: Tokenizer
) -> None:
    """Catches a file that llama.cpp loads and computes wrongly, and one that is half written when it is refused."""
    files = model_files(small("dense", vocab_size=350, **changes), tokenizer)
    with pytest.raises(ValueError, match=f"model: .*{reason}"):
        export_gguf(files, tmp_path / "a.gguf", "f32")
    assert os.listdir(tmp_path) == []


def test_other_reasons_are_given_first_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches a missing tokenizer, blocks that don't fit and encoders noticed only after minutes of writing."""
    config = small("dense", vocab_size=350)
    out = tmp_path / "out"
    out.mkdir()
    senses = Modality(SensesConfig.model_validate({"image": {"kind": "patches"}}), {})
    cases: list[tuple[ModelFiles, str, str]] = [
        (model_files(config), "f32", "has no tokenizer.json"),
        (model_files(config, tokenizer), "q8_0", r"blk\.0\.ffn_down\.weight has rows of 48: choose f16"),
        (model_files(config, tokenizer), "q4_0", "'q4_0' can't be exported: choose f32, f16, bf16, q8_0"),
        (model_files(config, tokenizer, modality=senses), "f32", "encoders and projectors for image"),
        (model_files(config, tokenizer, eos_ids=(1, 2, 3, 4)), "f32", "4 tokens end its texts"),
        (model_files(config.changed(vocab_size=300), tokenizer), "f32", "ids up to 33.*vocab_size is 300"),
    ]
    for files, kind, reason in cases:
        with pytest.raises(ValueError, match=reason):
            export_gguf(files, out / "a.gguf", kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no folder"):
        export_gguf(model_files(config, tokenizer), out / "none" / "a.gguf", "f32")
    assert os.listdir(out) == []


def test_a_failure_in_between_leaves_the_old_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches an export that destroys the one before it."""
    config, path = small("dense", vocab_size=350), tmp_path / "a.gguf"
    export_gguf(model_files(config, tokenizer), path, "f16")
    before = path.read_bytes()
    files = model_files(config, tokenizer)
    files.tensors["blocks.2.mlp.up_proj.weight"][0, 0] = 70000
    with pytest.raises(ValueError, match=r"blk\.2\.ffn_up\.weight has values beyond float16's range"):
        export_gguf(files, path, "f16")
    files.tensors["blocks.2.mlp.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        export_gguf(files, path, "f32")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.gguf"]


def rewritten(
    path: Path,
    tokenizer: Tokenizer,
    change: Callable[[dict[str, Any]], Any] = lambda fields: None,
    architecture: str = "dense",
    extra: dict[str, np.ndarray] | None = None,
    vocab_size: int = 350,
) -> Path:
    """An exported file with some of its metadata changed: values of gguf-py, so that types stay or are told."""
    export_gguf(model_files(small(architecture, vocab_size=vocab_size), tokenizer), path, "f32")
    reader = GGUFReader(path)
    fields = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    kinds = {key: value.types for key, value in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | (extra or {})
    del reader
    change(fields)
    writer = GGUFWriter(path.with_suffix(".changed"), fields.pop("general.architecture"))
    for key, value in fields.items():
        if key in kinds and type(value) is not str and kinds[key][0] != gguf.GGUFValueType.STRING:
            kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else kinds[key][0]
            writer.add_key_value(key, value, kind, kinds[key][-1] if isinstance(value, list) else None)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".changed")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "gemma2"}, "architecture 'gemma2' is not supported; Thinker opens llama, arcee"),
        ({"general.type": "adapter"}, "is a 'adapter', not a model"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.block_count": None}, "llama.block_count must be a whole number, found nothing"),
        ({"llama.block_count": 2**31}, "block_count is 2147483648, and there are only"),
        ({"llama.block_count": 2}, "unexpected blk.2"),
        ({"llama.block_count": 4}, "missing blk.3"),
        ({"llama.attention.head_count": 2**31}, "heads over a width"),
        ({"llama.attention.head_count_kv": 2}, r"attn_k\.weight has shape \[32, 32\].* says \[16, 32\]"),
        ({"llama.attention.head_count_kv": [4, 4, 2]}, "head_count_kv must be a whole number"),
        ({"llama.attention.value_length": 4}, "value_length 4 differs"),
        ({"llama.rope.dimension_count": 4}, "dimension_count 4 differs"),
        ({"llama.feed_forward_length": 96}, r"ffn_gate\.weight has shape \[48, 32\].* says \[96, 32\]"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2}, "missing blk.0.ffn_gate_inp"),
        ({"llama.expert_shared_count": 1}, "expert_shared_count 1 is not supported"),
        ({"llama.attention.sliding_window": 16}, "sliding_window 16"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type yarn"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "rope.scaling.factor 2.0"),
        ({"llama.rope.scaling.factor": 2.0}, "rope.scaling.factor 2.0"),
        ({"llama.logit_scale": 0.5}, "logit_scale 0.5"),
        ({"llama.attention.scale": 0.5}, "attention.scale 0.5"),
        ({"llama.something.new": 1}, "something.new 1 is not supported"),
        ({"llama.context_length": 2**31}, "context_length 2147483648 is beyond"),
        ({"llama.vocab_size": 349}, "vocab_size is not the 350 rows"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "norm_eps is 0"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported, only gpt2 and llama"),
        ({"tokenizer.ggml.model": "llama"}, "scores must give one number for each of 350"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5] * 350}, "no token for the byte <0x00>"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre 'tekken' is not supported, only gpt-2"),
        ({"tokenizer.ggml.pre": None}, "pre 'default' is not supported"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "one type for each of 350"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1]}, "1 tokens, its embedding 350 rows"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c' is no pair"),
        ({"tokenizer.ggml.merges": ["Q Z"]}, "'Q Z' speaks of tokens that don't exist"),
        ({"tokenizer.chat_template": ["a"]}, "chat_template must be a single value"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str, tokenizer: Tokenizer
) -> None:
    """Catches a model run wrongly because a setting was passed over."""

    def change(fields: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is None:
                del fields[key]
            else:
                fields[key] = value

    path = rewritten(tmp_path / "a.gguf", tokenizer, change)
    with pytest.raises(ValueError, match=reason) as caught:
        open_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llama.attention.sliding_window": 48},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.scaling.original_context_length": 48},
        {"llama.attention.head_count_kv": [4, 4, 4], "llama.feed_forward_length": [48, 48, 48]},
        {"llama.attention.causal": True, "general.languages": ["en"], "split.count": 1},
        {"tokenizer.ggml.bos_token_id": 4_000_000_000},
    ],
)
def test_what_changes_nothing_is_allowed(tmp_path: Path, changes: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Catches a refusal of files as other programs write them."""
    path = rewritten(tmp_path / "a.gguf", tokenizer, lambda fields: fields.update(changes))
    assert disagreement(open_model(path).config, small("dense", vocab_size=350)) is None


def test_a_file_without_vocabulary_opens_without_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches a crash over text that nobody asked for."""

    def change(fields: dict[str, Any]) -> None:
        for key in [key for key in fields if key.startswith("tokenizer")]:
            del fields[key]

    files = open_model(rewritten(tmp_path / "a.gguf", tokenizer, change))
    assert (files.tokenizer_json, files.bos_id, files.eos_ids, files.add_bos) == (None, None, (), False)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Catches biases passed over in silence, and NaN that speaks noise."""
    extra = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    with pytest.raises(ValueError, match=r"unexpected blk\.0\.attn_q\.bias"):
        open_model(rewritten(tmp_path / "a.gguf", tokenizer, extra=extra))
    extra = {"output_norm.weight": np.full(32, np.nan, np.float32)}
    files = open_model(rewritten(tmp_path / "a.gguf", tokenizer, extra=extra))
    with pytest.raises(ValueError, match=r"norm\.scale holds NaN"):
        files.tensors["norm.scale"]


@pytest.mark.parametrize(
    ("factor", "original", "high", "width"),
    [(8.0, 8192, 4.0, 64), (32.0, 8192, 4.0, 64), (4.0, 2048, 4.0, 16), (3.5, 3000, 4.0, 64), (8.0, 4096, 6.5, 64)],
)
def test_llama_3s_rope_scaling_is_recognised(
    tmp_path: Path,
    factor: float,
    original: int,
    high: float,
    width: int,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches long contexts of Llama 3 read without their scaling: the file has factors instead of settings."""
    scaling = RopeScaling(factor=factor, original_ctx_len=original, low_freq_factor=1.0, high_freq_factor=high)
    config = small("gqa", vocab_size=350, head_dim=width, rope_theta=500000.0, rope_scaling=scaling)
    export_gguf(model_files(config, tokenizer), tmp_path / "a.gguf", "f32")
    monkeypatch.setattr("thinker.formats.gguf_config.OWN_SCALING", "not in files of other programs")
    assert open_model(tmp_path / "a.gguf").config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("low", "high", "original", "width"), [(2.0, 4.0, 2048, 64), (1.0, 8.0, 64, 4), (1.5, 6, 512, 8)]
)
def test_thinkers_own_export_keeps_its_rope_scaling(
    tmp_path: Path, low: float, high: float, original: int, width: int, tokenizer: Tokenizer
) -> None:
    """Catches settings that the factors don't give away, so that Thinker refuses the file that it has just written."""
    scaling = RopeScaling(factor=10.0, original_ctx_len=original, low_freq_factor=low, high_freq_factor=high)
    config = small("gqa", vocab_size=350, head_dim=width, rope_theta=500000.0, rope_scaling=scaling)
    export_gguf(model_files(config, tokenizer), tmp_path / "a.gguf", "f32")
    assert open_model(tmp_path / "a.gguf").config.rope_scaling == scaling


@pytest.mark.parametrize(
    "claimed",
    ["", "[]", '{"factor": 1e999, "original_ctx_len": 1}', f'{{"factor": 8, "original_ctx_len": {"9" * 400}}}'],
)
def test_rope_settings_that_the_factors_belie_are_not_believed(
    tmp_path: Path, claimed: str, tokenizer: Tokenizer
) -> None:
    """Catches angles by what a file says instead of what it holds, and a claim that ends in a traceback."""
    path = rewritten(
        tmp_path / "a.gguf",
        tokenizer,
        lambda fields: fields.update({"thinker.rope_scaling": claimed}),
        extra={"rope_freqs.weight": np.linspace(1, 2, 4).astype(np.float32)},
    )
    with pytest.raises(ValueError, match=r"rope_freqs\.weight can't be traced back"):
        open_model(path)


@pytest.mark.parametrize("factors", [np.linspace(1, 2, 4), np.ones(3), np.array([1, 1, np.nan, 8]), np.zeros(4)])
def test_other_rope_factors_are_refused(tmp_path: Path, factors: np.ndarray, tokenizer: Tokenizer) -> None:
    """Catches angles computed by a rule that the file doesn't follow."""
    path = rewritten(tmp_path / "a.gguf", tokenizer, extra={"rope_freqs.weight": factors.astype(np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        open_model(path)
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert open_model(rewritten(tmp_path / "a.gguf", tokenizer, extra=extra)).config.rope_scaling is None


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "char", "ascii"])
def test_the_tokenizer_comes_back(tmp_path: Path, kind: str) -> None:
    """Catches another split, a lost merge, ids shifted, and a vocabulary without merges, which GGUF can't hold."""
    corpus = ["plain words"] if kind == "ascii" else CORPUS
    tokenizer = Tokenizer.train(corpus, 340, "bpe" if kind == "bpe" else "char")
    config = small("dense", vocab_size=tokenizer.vocab_size + 3)
    export_gguf(model_files(config, tokenizer), tmp_path / "a.gguf", "f32")
    text = open_model(tmp_path / "a.gguf").tokenizer_json
    assert text is not None
    found = Tokenizer.from_json(text)
    assert found.vocab_size == tokenizer.vocab_size
    assert found.special_ids == tokenizer.special_ids
    for awkward in AWKWARD:
        ids = tokenizer.encode(awkward)
        assert found.encode(awkward) == ids, awkward
        assert found.decode(ids) == awkward


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_way_of_cutting_has_its_name_both_ways(pre: str, tokenizer: Tokenizer) -> None:
    """Catches two ways taken for one another."""
    vocabulary = replace(to_vocabulary(tokenizer.to_json(), 340, "here"), pre=pre)
    assert to_vocabulary(to_tokenizer_json(vocabulary, "here"), 340, "here") == vocabulary
    assert WAYS[pre].add_bos == (pre == "llama-bpe")


def test_the_ways_cut_as_their_models_do(tokenizer: Tokenizer) -> None:
    """Catches a mistyped pattern: pieces of each way, worked out by hand from the pattern's words."""
    import tokenizers

    def pieces(pre: str, text: str) -> list[str]:
        values = to_tokenizer_json(Vocabulary(pre, tokenizer_tokens, [1] * 256, []), "here")
        backend = tokenizers.Tokenizer.from_str(values)
        assert backend.pre_tokenizer is not None
        return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    tokenizer_tokens = [
        tokenizer._backend.id_to_token(id) for id in range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256)
    ]
    text = "I'M you'll 12345\n\n  x=1"
    assert pieces("gpt-2", text) == ["I", "'", "M", " you", "'ll", " 12345", "\n\n ", " x", "=", "1"]
    digits = [" ", "1", "2", "3", "4", "5"]
    assert pieces("smollm", text) == ["I", "'", "M", " you", "'ll", *digits, "\n\n ", " x", "=", "1"]
    assert pieces("llama-bpe", text) == ["I", "'M", " you", "'ll", " ", "123", "45", "\n\n", " ", " x", "=", "1"]
    assert pieces("qwen2", text) == ["I", "'M", " you", "'ll", *digits, "\n\n", " ", " x", "=", "1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "byte-level BPE"),
        ({"model": {"byte_fallback": True}}, "byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "no name for how this tokenizer cuts text"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"merges": [["a b", "c"]]}}, "not pairs"),
        ({"normalizer": {"type": "NFC"}}, "NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": None}, "no name"),
        ({"added_tokens": [{"id": 1, "content": "<|bos|>", "special": True, "lstrip": True}]}, "takes the spaces"),
        ({"added_tokens": [{"id": 1, "content": "other", "special": True}]}, "share the id 1"),
        ({"added_tokens": [{"id": 341, "content": "[PAD340]"}]}, "reads like the padding"),
    ],
)
def test_tokenizers_gguf_cannot_carry_are_refused(change: dict[str, Any], reason: str, tokenizer: Tokenizer) -> None:
    """Catches other tokens in llama.cpp than in Thinker, which no error would ever show."""
    values = json.loads(tokenizer.to_json())
    merged = {
        key: values[key] | value if key == "model" and isinstance(value, dict) else value
        for key, value in change.items()
    }
    with pytest.raises(ValueError, match=f"here: .*{reason}"):
        to_vocabulary(json.dumps(values | merged), 350, "here")


def test_tokens_of_gguf_that_cannot_be_are_refused() -> None:
    """Catches two tokens with one text, of which one would never be read again."""
    for tokens, types, reason in (
        (["a", "a"], [1, 1], "0 and 1 are both 'a'"),
        (["a", "b"], [1, 6], "token 1 has the type 6"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_tokenizer_json(Vocabulary("gpt-2", tokens, types, []), "here")


def sentencepiece(path: Path, prefix: bool) -> Path:
    """A file with a SentencePiece vocabulary: bytes, characters and words with scores, learned by BPE."""
    import tokenizers
    from tokenizers import models, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in CORPUS + ["▁▁▁a▁▁b"] * 3], trainer)
    learned = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", *learned]
    types = [2, 3, 3, *[6] * 256, 4, *[1] * len(learned)]
    scores = [0.0] * 260 + [-float(rank) for rank in range(len(learned))]
    config = small("gqa", vocab_size=len(tokens) + 2)

    def change(fields: dict[str, Any]) -> None:
        for key in [key for key in fields if key.startswith("tokenizer")]:
            del fields[key]
        fields |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [*tokens, "<pad1>", "<pad2>"],
            "tokenizer.ggml.token_type": [*types, 5, 5],
            "tokenizer.ggml.scores": [*scores, 0.0, 0.0],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": prefix,
        }

    return rewritten(path, Tokenizer.train(CORPUS, 340), change, "gqa", vocab_size=config.vocab_size)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_cuts_as_llama_cpp_does(tmp_path: Path, prefix: bool) -> None:
    """Catches merges in another order than scores, a space lost in front, and bytes that don't fall back."""
    path = sentencepiece(tmp_path / "a.gguf", prefix)
    files = open_model(path)
    assert (files.bos_id, files.eos_ids, files.add_bos) == (1, (2,), True)
    assert files.tokenizer_json is not None
    tokenizer = Tokenizer.from_json(files.tokenizer_json)
    texts = [text for text in (*AWKWARD, *CORPUS, "x <s> </s>") if text]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in (*texts, "a <tool> b"):  # after such a token both begin anew, with a space
        assert tokenizer.encode(text, bos=True) == llama.tokenize(text.encode(), add_bos=True, special=False), text


# --- the real program -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "char", "ascii"])
def test_llama_cpp_cuts_the_same(tmp_path: Path, kind: str, tokenizer: Tokenizer) -> None:
    """Catches a pattern under the wrong name, and the file of a vocabulary without merges refused by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if kind in ("char", "ascii"):
        text = Tokenizer.train(CORPUS if kind == "char" else ["plain words"], 340, "char").to_json()
    else:
        vocabulary = replace(to_vocabulary(tokenizer.to_json(), tokenizer.vocab_size, "here"), pre=kind)
        text = to_tokenizer_json(vocabulary, "here")
    ours = Tokenizer.from_json(text)
    files = model_files(small("dense", vocab_size=ours.vocab_size + 2), tokenizer_json=text)
    export_gguf(files, tmp_path / "a.gguf", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for sample in (*AWKWARD, *CORPUS):
        assert llama.tokenize(sample.encode(), add_bos=True, special=False) == ours.encode(sample, bos=True), sample


@pytest.mark.parametrize(
    ("config", "kind"),
    [(name, "f32") for name in ("dense", "gqa", "moe", "plain_relu2", "qk_norm", "moe_gqa_qk_norm", "wide_heads")]
    + [(name, "f32") for name in ("tied", "rope_scaling")]
    # Where activations are rounded too, a router may choose another expert: no mixtures here.
    + [(name, "q8_0") for name in ("dense", "gqa", "plain_relu2", "gqa_qk_norm")],
    indirect=["config"],
)
def test_llama_cpp_computes_the_same(
    tmp_path: Path, config: ThinkerConfig, kind: ExportType, tokenizer: Tokenizer
) -> None:
    """Catches whatever all tests above could miss: llama.cpp itself reads the file, the text, and predicts."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import torch
    from conftest import randomise

    from thinker.model import ThinkerLM

    width = 24 if config.head_dim is not None else None
    config = config.changed(vocab_size=tokenizer.vocab_size, d_model=64, d_ff=96, head_dim=width, dropout=0.0)
    model = randomise(ThinkerLM(config))
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    export_gguf(model_files(config, tokenizer, tensors=values), tmp_path / "a.gguf", kind)
    files = open_model(tmp_path / "a.gguf")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(widen(files.tensors[name]))))
    llama = llama_cpp.Llama(
        str(tmp_path / "a.gguf"), n_ctx=48, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )
    for text in AWKWARD:
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text, bos=True), text
    tokens = tokenizer.encode("def function(argument): naïve 中文 12345", bos=True)[:40]
    llama.eval(tokens)
    found = torch.from_numpy(np.array(llama.scores[: len(tokens)]))
    with torch.no_grad():
        expected = model.double()(torch.tensor([tokens]))[0]
    # Against float64: float32 throughout there, but for Q8_0, where llama.cpp rounds activations to 8 bits as well.
    limit = 1e-5 if kind == "f32" else 0.1
    assert float((found - expected).abs().max()) < limit * float(expected.abs().max())
