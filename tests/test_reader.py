"""Proofs of the strict safetensors reader and the atomic writer: what is right is read, and nothing else is."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from thinker.checkpoint import files
from thinker.checkpoint.reader import DTYPES, all_finite, read_safetensors, read_weights, widen
from thinker.checkpoint.writer import write_safetensors


def encode(header: Any, data: bytes) -> bytes:
    """A safetensors file from its two parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def some_arrays() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    arrays = {f"t.{name}": (draws.random((3, 5)) * 100).astype(dtype) for name, dtype in DTYPES.items()}
    return arrays | {"scalar": np.array(3.5, np.float32), "empty": np.empty((0, 4), np.float32)}


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_reads_what_was_written(tmp_path: Path, writer: str) -> None:
    """Catches a wrong offset, shape or byte order for any type, scalars and empty tensors included."""
    path, arrays = tmp_path / "model.safetensors", some_arrays()
    if writer == "ours":
        write_safetensors(path, arrays, {"step": "7"})
    else:
        safetensors.numpy.save_file(arrays, path, {"step": "7"})
    found = read_safetensors(path)
    assert dict(found.metadata) == {"step": "7"}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found.shape(name) == found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def test_others_read_what_we_write(tmp_path: Path) -> None:
    """Catches a header that only our own reader understands."""
    path, arrays = tmp_path / "model.safetensors", some_arrays()
    write_safetensors(path, arrays, {"format": "pt"})
    found = safetensors.numpy.load_file(path)
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_arrays_are_read_only_and_aligned(tmp_path: Path) -> None:
    """Catches writing through to the file, and misaligned arrays that compiled code would crash on."""
    path = tmp_path / "model.safetensors"
    data = bytes([1]) + np.arange(3, dtype=np.float32).tobytes()
    path.write_bytes(encode({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [3], [1, 13])}, data))
    found = read_safetensors(path)
    assert found["b"].tolist() == [0, 1, 2]
    assert found["b"].flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        found["b"][0] = 1
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, some_arrays(), {})
    for name, array in read_safetensors(path).items():
        assert array.flags.aligned, name
        assert array.base is not None or array.size == 0, f"{name} was copied, though it lies aligned in the file"


TAMPERED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "short": (b"\0" * 7, "7 bytes"),
    "header longer than file": (struct.pack("<Q", 100) + b"{}", "claims 100 bytes"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "claims"),
    "no object": (encode(b"[]", b""), "no JSON object"),
    "a pickle": (b"PK\x03\x04" + b"\0" * 100, "its header claims"),
    "not UTF-8": (encode(b'{"\xff":1}', b""), "not UTF-8"),
    "not JSON": (encode(b'{"a":', b""), "not valid JSON"),
    "deep": (encode(b'{"a":' + b"[" * 100_000, b""), "not valid JSON"),
    "huge number": (encode(b'{"a":' + b"9" * 10_000 + b"}", b""), "not valid JSON"),
    "infinity": (encode(b'{"a":Infinity}', b""), "Infinity"),
    "same name twice": (
        encode(b'{"a":%b,"a":%b}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode()), b"\0" * 8),
        "twice",
    ),
    "same key twice": (
        encode(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "twice",
    ),
    "metadata no strings": (encode({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "entry no object": (encode({"a": 1}, b""), "dtype, shape and data_offsets"),
    "entry lacks a key": (encode({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "dtype, shape"),
    "entry has one more": (encode({"a": entry() | {"x": 1}}, b"\0" * 8), "dtype, shape"),
    "unknown type": (encode({"a": entry("F8_E4M3", [8])}, b"\0" * 8), "F8_E4M3"),
    "type no string": (encode({"a": entry([])}, b"\0" * 8), "type"),
    "negative size": (encode({"a": entry(shape=[-2])}, b"\0" * 8), "shape"),
    "true as size": (encode({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape"),
    "fraction": (encode({"a": entry(shape=[2.0])}, b"\0" * 8), "shape"),
    "sizes that overflow": (encode({"a": entry(shape=[2**47, 2**47])}, b"\0" * 8), "needs"),
    "product wraps to right": (encode({"a": entry("U8", [2**32, 2**32 + 1], [0, 2**32])}, b"\0" * 8), "needs"),
    "many dimensions": (encode({"a": entry(shape=[1] * 40 + [2])}, b"\0" * 8), "at most 8"),
    "empty and endless": (encode({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b""), "empty"),
    "one offset": (encode({"a": entry(offsets=[0])}, b"\0" * 8), "data_offsets"),
    "offsets swapped": (encode({"a": entry(offsets=[8, 0])}, b"\0" * 8), "needs 8 bytes"),
    "too few bytes for the shape": (encode({"a": entry(offsets=[0, 4])}, b"\0" * 8), "needs 8 bytes"),
    "beyond the end": (encode({"a": entry()}, b"\0" * 7), "truncated"),
    "bytes left over": (encode({"a": entry()}, b"\0" * 9), "truncated or tampered"),
    "overlap": (encode({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "the same bytes": (encode({"a": entry(), "b": entry()}, b"\0" * 8), "overlaps"),
    "hole": (encode({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "hole"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_files_give_one_line(tmp_path: Path, case: str) -> None:
    """Catches a check of lengths, offsets, shapes or types that was left out; each line names the file."""
    path, (content, reason) = tmp_path / "evil.safetensors", TAMPERED[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Catches a download that broke off and is read as a smaller model."""
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, {"a": np.ones(5, np.float32), "b": np.ones(3, np.int8)}, {"k": "v"})
    content, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            read_safetensors(path)


FUZZ = """
import random, resource, sys
from pathlib import Path
import numpy as np
from thinker.checkpoint.reader import read_safetensors
from thinker.checkpoint.writer import write_safetensors

path = Path(sys.argv[1])
write_safetensors(path, {"weight": np.ones((4, 8), np.float32), "bias": np.ones(4, np.float16)}, {"step": "3"})
content, draws = path.read_bytes(), random.Random(0)
length = int.from_bytes(content[:8], "little")
alphabet = [bytes([b]) for b in b'{}[],:"0123456789-eE.\\\\FUI'] + [b"null", b"true", b"99999999999999999999", b"[0,2]"]
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
outcomes = {"read": 0, "refused": 0}
for _ in range(int(sys.argv[2])):
    mutated = bytearray(content)
    for _ in range(draws.randint(1, 4)):
        place = draws.randrange(8 + length) if draws.random() < 0.9 else draws.randrange(len(mutated))
        match draws.randrange(4):
            case 0: mutated[place] = draws.randrange(256)
            case 1: mutated[place:place + draws.randint(1, 3)] = draws.choice(alphabet)
            case 2: del mutated[place:place + draws.randint(1, 9)]
            case 3: mutated[place:place] = mutated[place:place + draws.randint(1, 40)]
    if draws.random() < 0.5:  # a length that fits lets the mutation reach the checks behind it
        mutated[:8] = (length + len(mutated) - len(content)).to_bytes(8, "little", signed=True)
    path.write_bytes(mutated)
    try:
        file = read_safetensors(path)
        for name in file:
            file[name].sum(dtype=np.float32)
        outcomes["read"] += 1
    except ValueError as error:
        assert str(path) in str(error) and "\\n" not in str(error), error
        outcomes["refused"] += 1
print(outcomes["read"], outcomes["refused"])
"""


def test_fuzzed_files_raise_nothing_but_value_error(tmp_path: Path) -> None:
    """Catches a crash, an endless allocation (1 GiB is the limit) or another exception on 4,000 mutated files."""
    command = [sys.executable, "-c", FUZZ, str(tmp_path / "fuzz.safetensors"), "4000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert refused > 2000, "the mutations hardly reach anything"
    assert read > 0, "not even a mutated weight is read: the fuzzing itself is broken"


def write_sharded(folder: Path) -> dict[str, np.ndarray]:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.float32), "c": np.zeros(2, np.float16)}
    write_safetensors(folder / "model-1.safetensors", {"a": arrays["a"]}, {})
    write_safetensors(folder / "model-2.safetensors", {"b": arrays["b"], "c": arrays["c"]}, {})
    place = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return arrays


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    """Catches a tensor looked for in the wrong shard."""
    arrays = write_sharded(tmp_path)
    found = read_weights(tmp_path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert (found.shape(name), found.dtype(name)) == (array.shape, array.dtype)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, None),
        ({"weight_map": {"a": "model-9.safetensors"}}, "'model-9.safetensors' is missing"),
        ({"weight_map": {"b": "model-1.safetensors"}}, "'b' should be in 'model-1"),
        ({"weight_map": {"b": "model-2.safetensors"}}, "'c', which the index doesn't"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "no file name within"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file name within"),
        ({"weight_map": {"a": 1}}, "no file name within"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: dict[str, Any], reason: str | None) -> None:
    """Catches a missing shard going unnoticed, and an index that reaches outside its folder."""
    write_sharded(tmp_path)
    write_safetensors(tmp_path.parent / "outside.safetensors", {"a": np.ones(1, np.float32)}, {})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if reason is None:
        assert list(read_weights(tmp_path)) == ["a"]
        return
    with pytest.raises(ValueError, match=reason):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt", "model.pkl"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Catches code from a pickle file being run, and a message that doesn't say what to do."""
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for attempt in (lambda: read_safetensors(tmp_path / name), lambda: read_weights(tmp_path)):
        with pytest.raises(ValueError, match=rf"{name}: is a pickle file.*convert it to safetensors"):
            attempt()


def test_missing_files_are_named(tmp_path: Path) -> None:
    """Catches a traceback for a path that isn't there, is a folder, or holds no weights."""
    with pytest.raises(ValueError, match=r"none\.safetensors: cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_safetensors(tmp_path)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        read_weights(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_found(dtype: Any, value: float) -> None:
    """Catches NaN that slips through at the end of a chunk or in a narrow type."""
    array = np.linspace(-3, 3, 2**20 + 7).astype(dtype)
    assert all_finite(array)
    for place in (0, 2**20 - 1, 2**20, len(array) - 1):
        bad = array.copy()
        bad[place] = value
        assert not all_finite(bad), place
    assert all_finite(np.empty(0, dtype))
    assert all_finite(np.full(3, np.iinfo(np.int64).max))


def test_widening_is_exact() -> None:
    """Catches bfloat16 read as float16, or float32 copied for nothing."""
    bits = np.arange(2**16, dtype=np.uint16)
    narrow = bits.view(ml_dtypes.bfloat16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(expected)
    assert np.array_equal(widen(narrow)[finite], expected[finite])
    assert widen(expected) is expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_not_written(tmp_path: Path, bad: float) -> None:
    """Catches a diverged model replacing a good file."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": np.ones(3, np.float32)}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        write_safetensors(path, {"w": np.array([1, bad], np.float32)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_casts_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """Catches float16 overflow to infinity, and casting that truncates instead of rounding."""
    path = tmp_path / "model.safetensors"
    values = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        write_safetensors(path, {"w": values}, {}, dtype)
        assert read_safetensors(path)["w"].tobytes() == values.astype(dtype).tobytes()
    with pytest.raises(ValueError, match=r"w reaches 70000, beyond the range of float16; choose bfloat16"):
        write_safetensors(path, {"w": np.array([1, -70000], np.float32)}, {}, np.dtype(np.float16))


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Catches writing in place: a full disk would destroy the file that was there."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": np.ones(3, np.float32)}, {})
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, operation, fail)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"w": np.zeros(3, np.float32)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    """Catches temporary files that pile up, and the deletion of one that is being written, or that is a person's."""
    old, folder, new = (files.temporary_name(tmp_path / name) for name in "abc")
    mine, thesis = tmp_path / "a", tmp_path / ".thesis.tmp"
    for path in (folder, thesis):
        path.mkdir()
        (path / "x").touch()
    for path in (old, new, mine):
        path.touch()
    for path in (old, folder, mine, thesis):
        os.utime(path, (1, 1))
    files.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {new, mine, thesis}


def test_opening_models_imports_neither_torch_nor_gguf() -> None:
    """Catches an import that makes every `thinker generate` wait seconds for torch."""
    script = (
        "import sys, thinker.formats, thinker.formats.huggingface, thinker.checkpoint.publish\n"
        "print([name for name in ('torch', 'gguf', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
