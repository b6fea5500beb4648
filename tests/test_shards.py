"""Tokens on disk: the right ones, made once, whole or not at all, in bounded memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from thinker.data import reading, shards
from thinker.data.shards import prepare
from thinker.data.sources import open_sources
from thinker.tokenizer import SPECIAL_TOKENS, Tokenizer

STORIES = [f"Story {i}: a fox said <|eos|> to {i} hens.\n\nThe é中🙂 end of {i * i}." for i in range(300)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> str:
    """300 documents in a folder."""
    (tmp_path / "own").mkdir()
    for i, story in enumerate(STORIES):
        (tmp_path / "own" / f"{i:03}.txt").write_text(story, encoding="utf-8")
    return str(tmp_path / "own")


def documents_in(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts between bos and eos; fails if anything stands outside of them."""
    ids = tokens.tolist()
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id)
    texts = []
    while ids:
        end = ids.index(tokenizer.eos_id)
        assert ids[0] == tokenizer.bos_id
        texts.append(tokenizer.decode(ids[1:end]))
        del ids[: end + 1]
    return texts


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_documents_come_back(folder: str, kind: str) -> None:
    """A document that is lost, cut, doubled, or without its bos or eos; held-out text in the training side."""
    corpus = prepare([folder], kind, vocab_size=400)
    train, valid = documents_in(corpus.train, corpus.tokenizer), documents_in(corpus.valid, corpus.tokenizer)
    assert sorted(train + valid) == sorted(STORIES)
    assert (corpus.train_documents, corpus.valid_documents) == (len(train), len(valid))
    assert corpus.train_bytes == len("".join(train).encode())
    assert corpus.valid_bytes == len("".join(valid).encode())
    assert b"".join(corpus.valid_text()) == "".join(valid).encode()
    assert ["".join(document.read()) for document in corpus.held_out()] == valid
    assert 0 < len(valid) < 50
    assert corpus.train.dtype == np.uint16
    assert isinstance(corpus.train, np.memmap)
    assert not corpus.train.flags.writeable


def test_pieces_of_a_file_are_one_document(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading in pieces must not show: no bos within a file, and the tokens of the uncut text."""
    text = "".join(
        f"def f{i}(x):\n    '''é 中'''\n\n    return x  *  {i}\n\n\n# {i}\nprint({i})\n" for i in range(2000)
    )
    path = tmp_path / "code.py"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 7000)
    monkeypatch.setattr(shards, "BATCH_PIECES", 5)
    corpus = prepare([str(path)], vocab_size=600)
    whole = "".join(documents_in(corpus.train, corpus.tokenizer))
    assert text.startswith(whole)
    assert corpus.train.tolist() == [1, *corpus.tokenizer.encode(whole), 2]
    assert (corpus.train_documents, corpus.valid_documents) == (1, 1)
    (held_out,) = corpus.held_out()
    assert whole + "".join(held_out.read()) == text


def test_unchanged_text_is_not_tokenised_again(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of waiting before every run, and a resumed run that finds other tokens than it was trained on."""
    first = prepare([folder], vocab_size=400)

    def refuse(*_: object) -> None:
        raise AssertionError("text was tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    again = prepare([folder], vocab_size=400)
    resumed = prepare([folder], Tokenizer.from_json(first.tokenizer.to_json()))  # as a checkpoint keeps it
    for corpus in (again, resumed):
        assert corpus.fingerprint == first.fingerprint
        np.testing.assert_array_equal(corpus.train, first.train)
        assert (corpus.valid_bytes, corpus.train_documents) == (first.valid_bytes, first.train_documents)
    for changed in ({"vocab_size": 401}, {"tokenizer": "char", "vocab_size": 400}):
        with pytest.raises(AssertionError, match="tokenised again"):
            prepare([folder], **changed)
    Path(folder, "000.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare([folder], first.tokenizer)


def test_the_fingerprint_is_of_the_tokens(folder: str, tmp_path: Path) -> None:
    """A run must go on after its text was copied to another machine, and must not after a word of it changed."""
    first = prepare([folder], vocab_size=400)
    shutil.copytree(folder, tmp_path / "copied")
    Path(folder, "001.txt").touch()
    assert prepare([str(tmp_path / "copied")], first.tokenizer).fingerprint == first.fingerprint
    assert prepare([folder], first.tokenizer).fingerprint == first.fingerprint
    assert prepare([folder], "char", vocab_size=400).fingerprint != first.fingerprint
    Path(folder, "001.txt").write_text("another story")
    assert prepare([folder], first.tokenizer).fingerprint != first.fingerprint


def test_large_vocabularies_take_four_bytes(folder: str) -> None:
    """Ids beyond 65,535 in uint16 would wrap around to other tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"never{i}" for i in range(65_536 - len(SPECIAL_TOKENS) - 255)]
    for tokens, dtype in ((filler[1:], np.uint16), (filler, np.uint32)):
        vocabulary = {token: id for id, token in enumerate([*SPECIAL_TOKENS, *tokens, *alphabet])}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        corpus = prepare([folder], Tokenizer.from_json(backend.to_str()))
        assert corpus.train.dtype == dtype
        assert corpus.train.max() > 65_400
        assert set(documents_in(corpus.valid, corpus.tokenizer)) <= set(STORIES)


def test_a_tokenizer_from_a_file(folder: str, tmp_path: Path) -> None:
    """--tokenizer FILE without bos and eos of its own must get them, or documents would run into each other."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "theirs.json"))
    corpus = prepare([folder], str(tmp_path / "theirs.json"))
    assert corpus.tokenizer.bos_id is not None
    assert corpus.tokenizer.bos_id > 255
    assert set(documents_in(corpus.valid, corpus.tokenizer)) <= set(STORIES)
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be used as a tokenizer"):
        prepare([folder], str(tmp_path / "nowhere.json"))


def test_a_models_tokenizer_without_bos_and_eos(folder: str) -> None:
    """Going on with a model that never had them must work, and invent no ids."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer.from_json(backend.to_str())
    corpus = prepare([folder], tokenizer)
    assert tokenizer.decode(corpus.valid) == b"".join(corpus.valid_text()).decode()
    assert len(corpus.train) == corpus.train_bytes


# Training a tokenizer


def test_the_sample_is_spread_and_bounded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the beginning alone would know nothing of the rest; held-out text in it would flatter the result."""
    monkeypatch.setattr(shards, "SAMPLE_CHARACTERS", 2000)
    opened = open_sources([folder])
    sample = shards._sample(opened)
    numbers = [STORIES.index(text) for text in sample]
    assert 1000 < sum(map(len, sample)) <= 4000 < sum(map(len, STORIES))
    assert numbers == sorted(numbers)
    assert numbers[0] < 20
    assert numbers[-1] > 280
    assert max(np.diff(numbers)) < 30
    assert not {"".join(document.read()) for document in opened.documents("valid")} & set(sample)


def test_a_small_corpus_is_sampled_whole(folder: str) -> None:
    """Leaving text out that there is room for makes a worse tokenizer."""
    opened = open_sources([folder])
    assert sum(map(len, shards._sample(opened))) == sum(
        len(text) for document in opened.documents("train") for text in document.read()
    )


def test_a_smaller_vocabulary_is_said(folder: str) -> None:
    """A person who asked for 5,000 tokens and got fewer must hear of it, for the model gets another size."""
    said: list[str] = []
    corpus = prepare([folder], "char", vocab_size=5000, say=said.append)
    assert f"yields {corpus.tokenizer.vocab_size} tokens, not the 5,000 allowed" in said[0]
    assert f"{len(corpus.train):,} tokens" in said[1]
    said.clear()
    prepare([folder], "char", vocab_size=corpus.tokenizer.vocab_size, say=said.append)
    assert len(said) == 1


def test_a_tokenizer_that_spells_the_text_is_said(folder: str) -> None:
    """Bug: a model of another language learns a text letter by letter, and nobody is told why it learns so little."""
    said: list[str] = []
    letters = "abcdefghijklmnopqrstuvwxyz"
    tripled = Tokenizer.train([a + b + a + " " for a in letters for b in letters] * 3, 1500)
    assert tripled.vocab_size > shards.LARGE_VOCABULARY
    prepare((folder,), tripled, say=said.append)
    assert [line for line in said if "isn't made for this text: 0." in line] == said[-1:]
    said.clear()
    prepare((folder,), "char", say=said.append)
    prepare((folder,), Tokenizer.train(STORIES, 1500), say=said.append)
    assert not any("isn't made" in line for line in said)


# Whole or not at all


def test_an_interrupted_run_leaves_nothing(folder: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a shard under the final name would be trained on by the next run."""
    write = shards._write

    def interrupted(*arguments: object) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([folder], vocab_size=400)
        assert list((cache / "shards").iterdir()) == []
    assert prepare([folder], vocab_size=400).train_documents > 200


def test_damaged_shards_are_made_again(folder: str) -> None:
    """A disk that was full, or a folder cleaned by half, must not stop every later run."""
    whole = prepare([folder], vocab_size=400)
    expected, text, place = np.array(whole.train), b"".join(whole.valid_text()), whole.folder
    tokens = (place / "train.bin").read_bytes()
    for damage in (
        lambda: (place / "train.bin").write_bytes(tokens[:-2]),
        lambda: (place / "train.bin").write_bytes(tokens + b"??"),
        lambda: (place / "valid.bin").unlink(),
        lambda: (place / "valid.txt").write_text("x"),
        lambda: (place / "valid.starts").unlink(),
        lambda: (place / "meta.json").write_text("{}"),
        lambda: (place / "meta.json").write_text("{"),
    ):
        damage()
        mended = prepare([folder], vocab_size=400)
        np.testing.assert_array_equal(mended.train, expected)
        assert b"".join(mended.valid_text()) == text
        assert (place / "train.bin").read_bytes() == tokens


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: bytes(len(data))])
def test_a_damaged_tokenizer_is_made_again(folder: str, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    """A machine that lost power while one was written must not refuse this text from then on."""
    whole = prepare([folder], vocab_size=400).tokenizer.to_json()
    (path,) = (cache / "tokenizers").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert prepare([folder], vocab_size=400).tokenizer.to_json() == whole
    assert Tokenizer.from_file(path).to_json() == whole


def test_two_processes_at_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs started together make the same shards; the slower one must use them, not fail."""
    write = shards._write

    def overtaken(*arguments: object) -> dict[str, int]:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_write", write)
            prepare([folder], vocab_size=400)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", overtaken)
        corpus = prepare([folder], vocab_size=400)
    assert sorted(path.name for path in corpus.folder.parent.iterdir()) == [corpus.folder.name]


def test_leftovers_of_killed_processes_go(folder: str, cache: Path) -> None:
    """Each killed run would keep its gigabytes forever; those of a run at work must stay."""
    for name, age in (("unfinished-old", 90_000), ("unfinished-new", 60)):
        (cache / "shards" / name).mkdir(parents=True)
        os.utime(cache / "shards" / name, (time.time() - age,) * 2)
    corpus = prepare([folder], vocab_size=400)
    assert {path.name for path in (cache / "shards").iterdir()} == {"unfinished-new", corpus.folder.name}


def test_leftovers_may_go_by_themselves(folder: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs on different texts: one finishes between the other's finding its unfinished folder and looking at it."""
    (cache / "shards").mkdir(parents=True)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / pattern.replace("*", "gone")]))
    assert prepare([folder], vocab_size=400).train_documents > 200


# What cannot work


def test_too_short(tmp_path: Path, cache: Path) -> None:
    """A text shorter than one window must be refused with both numbers, not crash in the middle of a step."""
    path = tmp_path / "short.txt"
    path.write_text("To be or not to be.\n")
    tokens = len(prepare([str(path)], "char").train)
    with pytest.raises(ValueError, match=rf"short\.txt: {tokens} tokens found, at least 65 needed: give more text"):
        prepare([str(path)], "char", min_tokens=65)
    path.write_text("x")
    with pytest.raises(ValueError, match=r"short\.txt: 0 tokens found, at least 2 needed"):
        prepare([str(path)], "char")
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"none\.jsonl: 0 tokens found"):
        prepare([str(tmp_path / "none.jsonl")], "char")


def test_a_broken_file_stops_before_anything_is_kept(folder: str, cache: Path) -> None:
    """A Latin-1 file deep in a folder is an error that names it, and leaves no shards behind."""
    Path(folder, "007.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"007\.txt: not UTF-8"):
        prepare([folder], Tokenizer.train([], 1000))
    assert list((cache / "shards").iterdir()) == []


def test_a_cache_that_cannot_be_written(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room or no right to write must end in one line that says where, not in a traceback."""
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ValueError, match=r"taken.*THINKER_CACHE") as error:
        prepare([folder], "char")
    assert "\n" not in str(error.value)


# Memory and imports, in processes of their own


def run(code: str, *arguments: str) -> str:
    """What a fresh Python prints for this code."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_torch() -> None:
    """Preparing text on a machine, or in a process, without torch: importing it costs seconds."""
    code = "import sys, thinker.data.batches, thinker.data.shards; print({'torch', 'numba'} & set(sys.modules))"
    assert run(code) == "set()\n"


# VmHWM is the peak of this very process; ru_maxrss would inherit that of the process that started it.
PEAK = """
import sys
from pathlib import Path

from thinker.data.shards import prepare


def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024


before = peak()
corpus = prepare([sys.argv[1]], vocab_size=2000)
print(before, peak(), len(corpus.train), corpus.train_bytes + corpus.valid_bytes)
"""


def peak_memory(path: Path, megabytes: int) -> tuple[float, float]:
    """Peak memory in MB, before and after preparing a generated file of that size."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, rng.integers(2, 10)))) for _ in range(20_000)])
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            chosen = words[np.minimum(rng.zipf(1.3, 100_000) - 1, len(words) - 1)]
            written += file.write("\n".join(" ".join(chosen[i : i + 10]) for i in range(0, len(chosen), 10)) + "\n")
    before, after, tokens, size = run(PEAK, str(path)).split()
    assert int(size) == written
    assert int(tokens) > written / 20
    return float(before), float(after)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@needs_proc
def test_memory_is_bounded(tmp_path: Path, cache: Path) -> None:
    """Encoding a corpus in one go kills laptops: these 12 MB would take 300 MB so, and take half of it in batches."""
    before, after = peak_memory(tmp_path / "generated.txt", 12)
    assert after - before < 220, (before, after)


@needs_proc
@pytest.mark.slow
def test_memory_is_bounded_for_300_megabytes(tmp_path: Path, cache: Path) -> None:
    """What grows slowly with the size of the corpus shows in a large one only."""
    before, after = peak_memory(tmp_path / "generated.txt", 300)
    assert after < 700, (before, after)
    shutil.rmtree(cache)
