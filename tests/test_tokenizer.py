"""The tokenizer: round trips, controls out of reach of any text, characters, streaming, and other people's files."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from thinker.tokenizer import KINDS, NAMED, SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

SAMPLE = [
    "def add(a, b):\n    return a + b\n\n\n" * 3,
    "The quick brown fox jumps over the lazy dog. 中文字符 русский язык été 🙂🙂 中文\n" * 4,
]
TRAINED = {kind: Tokenizer.train(SAMPLE, 500, kind) for kind in KINDS}
# Letters of one to four bytes, known and unknown to the sample, and what looks like a control token.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL_TOKENS[:4], "<|end|>", "中文", "文", "丰", "é", "è", "🙂", "🙃", " ", "\n"]),
        st.text(),
    ),
    max_size=12,
).map("".join)


def foreign(special: Iterable[str] = ("<|endoftext|>",), first: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """A byte-level BPE as others train them, with the controls at the end or in front."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(first),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE, trainer)
    backend.add_special_tokens(list(special))
    return backend


def sentencepiece() -> Tokenizer:
    """BPE with bytes to fall back on and a space put in front, as Llama 2 and Mixtral have it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", "a", "b", "ab", "▁ab"):
        vocabulary[token] = len(vocabulary)
    model = models.BPE(vocabulary, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer.from_json(backend.to_str())


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_ids(kind: str) -> None:
    """A special token at another id in one kind of tokenizer would make checkpoints and data disagree."""
    tokenizer = TRAINED[kind]
    assert len(SPECIAL_TOKENS) == 32
    assert tokenizer.special_ids == {name: id for id, name in enumerate(SPECIAL_TOKENS)}
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.control_ids == set(range(32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [SMALLEST_VOCABULARY, 291, 5000])
def test_vocab_size_is_a_ceiling(kind: str, vocab_size: int) -> None:
    """A vocabulary with gaps, or larger than asked for, gives rows of the embedding that don't exist."""
    tokenizer = Tokenizer.train(SAMPLE, vocab_size, kind)
    assert SMALLEST_VOCABULARY <= tokenizer.vocab_size <= vocab_size
    assert all(tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert max(tokenizer.encode("".join(SAMPLE))) < tokenizer.vocab_size


def test_every_byte_is_a_token() -> None:
    """A byte that the sample lacked would vanish from other texts."""
    for tokenizer in TRAINED.values():
        assert {tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_what_a_token_was_merged_from(kind: str) -> None:
    """Bug: parts in the wrong order or of another token, or a byte or a control token that has some."""
    tokenizer = TRAINED[kind]
    parts = tokenizer.parts()
    assert parts.shape == (tokenizer.vocab_size, 2)
    merged = {id for id, (first, _) in enumerate(parts) if first >= 0}
    single = {id for id in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(id)) == 1}
    assert merged == set(range(tokenizer.vocab_size)) - single - tokenizer.control_ids
    for id in merged:
        assert b"".join(map(tokenizer.token_bytes, parts[id])) == tokenizer.token_bytes(id)


def test_no_text_at_all() -> None:
    """A tokenizer without a corpus must still hold bytes and controls, not fail."""
    for kind in KINDS:
        assert Tokenizer.train([], 1000, kind).vocab_size == SMALLEST_VOCABULARY


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_text_comes_back_and_never_is_a_control(kind: str, text: str) -> None:
    """A user who types <|eos|> must not end the document, and no character may be lost."""
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids.intersection(ids)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    (batched,) = tokenizer.encode_batch([text])
    assert batched.dtype == np.uint32
    assert batched.tolist() == ids


@given(text=TEXTS)
def test_characters_keep_their_borders(text: str) -> None:
    """A merge across characters would make "characters" a BPE of another kind, and pieces of two letters one token."""
    tokenizer = TRAINED["char"]
    ends = np.cumsum([len(tokenizer.token_bytes(id)) for id in tokenizer.encode(text)])
    borders = np.cumsum([len(character.encode()) for character in text])
    assert set(borders.tolist()) <= set(ends.tolist())


def test_characters_of_the_sample_are_one_token() -> None:
    """Characters that fall apart into bytes would make sequences two to four times as long."""
    text = "".join(SAMPLE)
    assert len(TRAINED["char"].encode(text)) == len(text)


def test_frequent_characters_come_first() -> None:
    """With room for few, a rare character must not take the place of a frequent one. 中 needs two ids, é one."""
    texts = ["é" + "中" * 5 + "я" * 3]
    assert [len(Tokenizer.train(texts, SMALLEST_VOCABULARY + n, "char").encode("中яé")) for n in range(5)] == [
        7, 7, 5, 4, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats(kind: str) -> None:
    """A vocabulary that depends on hash seeds or threads would make a run unrepeatable."""
    assert Tokenizer.train(iter(SAMPLE), 500, kind).to_json() == TRAINED[kind].to_json()


def test_impossible_requests() -> None:
    """An error must say what was asked, what is possible, and how to mend it."""
    with pytest.raises(ValueError, match=r"vocab_size 287 is too small.*at least 288"):
        Tokenizer.train(SAMPLE, 287)
    with pytest.raises(ValueError, match="'words' is unknown: choose bpe or char"):
        Tokenizer.train(SAMPLE, 1000, "words")
    with pytest.raises(ValueError, match="surrogate"):
        TRAINED["bpe"].encode("half: \ud83d")
    with pytest.raises(ValueError, match="surrogate"):
        TRAINED["bpe"].encode_batch(["whole", "half: \ud83d"])


def test_bos_is_put_in_front_once() -> None:
    """A doubled or missing bos shifts every later logit."""
    tokenizer = TRAINED["bpe"]
    assert tokenizer.encode("fox", bos=True) == [1, *tokenizer.encode("fox")]
    assert tokenizer.encode("", bos=True) == [1]
    assert Tokenizer.from_json(foreign().to_str()).encode("", bos=True) == []


# Decoding


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_ids_decode_as_the_library_does(kind: str, data: st.DataObject) -> None:
    """Broken UTF-8, split characters and controls in between must read the same here, streamed, and elsewhere."""
    tokenizer = TRAINED[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    expected = tokenizers.Tokenizer.from_str(tokenizer.to_json()).decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special=skip) == expected
    stream = tokenizer.stream(skip_special=skip)
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == expected


def test_stream_holds_back_the_unfinished_character() -> None:
    """A terminal that is sent half a character shows a question mark for good."""
    tokenizer = Tokenizer.train([], SMALLEST_VOCABULARY)
    stream = tokenizer.stream()
    assert [stream.push(id) for id in tokenizer.encode("é🙂x")] == ["", "é", "", "", "", "🙂", "x"]
    assert stream.flush() == ""
    for id in tokenizer.encode("🙂")[:3]:
        assert stream.push(id) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_controls_in_the_stream() -> None:
    """Special tokens must not show up in generated text unless asked for."""
    tokenizer = TRAINED["bpe"]
    ids = [1, *tokenizer.encode("fox"), 2]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, skip_special=False) == "<|bos|>fox<|eos|>"
    assert tokenizer.decode(np.array(ids)) == "fox"


# Other programs' files


def test_transformers_reads_the_same_ids() -> None:
    """A file that means something else in transformers breaks every use of a published model, silently."""
    transformers = pytest.importorskip("transformers")
    text = "".join(SAMPLE) + "def über(x):\n\treturn  x**2   # 丰🙃\r\n"
    for tokenizer in TRAINED.values():
        backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>"
        )
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(32))


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip(kind: str) -> None:
    """Saving and loading must change nothing, neither ids nor the refusal to read controls in a text."""
    again = Tokenizer.from_json(TRAINED[kind].to_json())
    assert again.to_json() == TRAINED[kind].to_json()
    assert again.special_ids == TRAINED[kind].special_ids
    assert Tokenizer.from_json(again.to_json(), complete=True).to_json() == again.to_json()
    assert again.encode("<|eos|> 中") == TRAINED[kind].encode("<|eos|> 中")


def test_a_models_own_tokenizer_is_left_alone() -> None:
    """Tokens appended to a finished model's tokenizer have no rows in its embedding."""
    backend = foreign()
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.special_ids == {"<|eos|>": backend.token_to_id("<|endoftext|>")}
    assert (tokenizer.pad_id, tokenizer.bos_id) == (None, None)


def test_completion_appends_what_is_missing_and_knows_synonyms() -> None:
    """A second eos beside <|endoftext|> would never be learnt; an id moved by appending would scramble a model."""
    backend = foreign(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    text = "".join(SAMPLE)
    tokenizer = Tokenizer.from_json(backend.to_str(), complete=True)
    assert tokenizer.eos_id == backend.token_to_id("<|endoftext|>")
    assert tokenizer.special_ids["<|end|>"] == backend.token_to_id("<|im_end|>")
    assert tokenizer.special_ids.keys() == set(NAMED)
    appended = [id for id in tokenizer.special_ids.values() if id >= backend.get_vocab_size()]
    assert sorted(appended) == list(range(backend.get_vocab_size(), tokenizer.vocab_size))
    assert len(appended) == len(NAMED) - 2
    assert tokenizer.encode(text) == backend.encode(text).ids


@pytest.mark.parametrize("complete", [False, True])
def test_controls_of_a_foreign_tokenizer_are_out_of_reach(complete: bool) -> None:
    """<|im_end|> typed by a user would end the turn in the user's name."""
    backend = foreign(special=["<|endoftext|>", "<|im_end|>"], first=["<s>", "</s>"])
    tokenizer = Tokenizer.from_json(backend.to_str(), complete)
    text = "a<|endoftext|><|im_end|> <s></s><|pad|><|user|>"
    assert backend.token_to_id("<|im_end|>") in backend.encode(text).ids
    assert not tokenizer.control_ids.intersection(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_id == backend.token_to_id("<s>")
    assert tokenizer.eos_id == backend.token_to_id("</s>")


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    """A tokenizer.json saved with truncation cuts every document to 512 tokens without a word."""
    backend = foreign()
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.decode(tokenizer.encode("the quick brown fox " * 9)) == "the quick brown fox " * 9
    assert len(tokenizer.encode_batch(["a", "the quick brown fox"])[0]) == 1


def test_added_words_are_text() -> None:
    """A word added by others, special or not, must come back letter by letter, not through the table of bytes."""
    backend = foreign()
    backend.add_tokens(["wörd"])
    tokenizer = Tokenizer.from_json(backend.to_str())
    ids = tokenizer.encode("fox wörd")
    assert ids[-1] == backend.token_to_id("wörd")
    assert tokenizer.decode(ids) == "fox wörd"


def test_sentencepiece_kind() -> None:
    """Mixtral's tokenizer is no byte-level one: its space marks, byte tokens and first space need their own reading."""
    tokenizer = sentencepiece()
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for text in ("ab ab", " ab", "é中🙂 ab", "", "a<s></s>b"):
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids or "<s>" in text
        assert not tokenizer.control_ids.intersection(ids)
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == "".join([stream.push(id) for id in ids]) + stream.flush() == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    with pytest.raises(ValueError, match="byte-level BPE only"):
        Tokenizer.from_json(tokenizer.to_json(), complete=True)


def test_unusable_files(tmp_path) -> None:
    """Files that can't serve must be named, with the reason, before a run is spent on them."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be used.*No such file"):
        Tokenizer.from_file(path)

    def refuses(text: str, reason: str) -> None:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"tokenizer\.json: cannot be used as a tokenizer: .*{reason}"):
            Tokenizer.from_file(path, complete=True)

    refuses("{}", "not a tokenizer")
    refuses(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str(), "WordPiece vocabulary")
    whole = json.loads(foreign().to_str())
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        refuses(json.dumps(whole | {"model": whole["model"] | {key: "##"}}), f"BPE with {key} is not supported")
    refuses("[", "not a tokenizer")
    ordinary = json.loads(foreign(special=["<|pad|>"]).to_str())
    ordinary["added_tokens"][0]["special"] = False
    refuses(json.dumps(ordinary), "<|pad|> is an ordinary token".replace("|", r"\|"))
    gaps = json.loads(json.dumps(whole))
    gaps["model"]["vocab"]["far"] = 10_000
    refuses(json.dumps(gaps), "without gaps")
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert Tokenizer.from_file(path, complete=True).pad_id is not None


def test_a_vocabulary_without_every_byte_is_refused_for_training() -> None:
    """Letters that the vocabulary can't spell would be dropped from the corpus without a word."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="2 of the 256 bytes"):
        Tokenizer.from_json(backend.to_str(), complete=True)


def test_what_has_no_token_is_not_left_out_of_a_corpus() -> None:
    """Catches bits per byte of a text of which the model never saw most, and what was trained on less than was given.

    Without `initial_alphabet` the library's trainer knows only the bytes that it met.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["the quick brown fox, é"], trainers.BpeTrainer(vocab_size=40, show_progress=False))
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert len(tokenizer.encode_batch(["the fox é"])[0])
    assert not tokenizer.missing_bytes & set("the fox é".encode())
    with pytest.raises(ValueError, match="no tokens for '日': leave it out"):
        tokenizer.encode_batch(["the fox", "the 日本"])
    values = json.loads(backend.to_str())
    values["model"]["unk_token"] = "<nowhere>"  # for which the library has an error of its own
    assert Tokenizer.from_json(json.dumps(values)).encode("日本") == []
    assert tokenizer.encode("日本") == []  # a prompt is read as it would be elsewhere, and `load` says so
    assert not sentencepiece().missing_bytes
    assert not Tokenizer.from_json(foreign().to_str()).missing_bytes


def test_merges_are_not_left_out_by_chance() -> None:
    """Catches BPE's dropout, which some keep in the file: the same text, and other tokens every time."""
    values = json.loads(foreign().to_str())
    values["model"]["dropout"] = 0.5
    tokenizer = Tokenizer.from_json(json.dumps(values))
    assert tokenizer.encode(SAMPLE[0] * 9) == Tokenizer.from_json(foreign().to_str()).encode(SAMPLE[0] * 9)
    assert json.loads(tokenizer.to_json())["model"]["dropout"] is None
