"""Text to token ids and back: byte-level BPE, characters, and the special tokens every vocabulary reserves.

What an id means is decided here and stored as a `tokenizer.json` that other tools read; merging itself is the
`tokenizers` library's. A text never becomes a control id, whatever it contains: those are put in by `data/` (a document
begins with bos and ends with eos) and by `chat.py`, as numbers. No files but tokenizer.json are read or written here.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

KINDS = ("bpe", "char")

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
MEDIA = ("<|image_start|>", "<|image|>", "<|image_end|>", "<|audio_start|>", "<|audio|>", "<|audio_end|>")
NAMED = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END, *MEDIA)
# Spares let a finished model learn a new control token without new rows in its embedding.
SPECIAL_TOKENS = NAMED + tuple(f"<|spare_{i}|>" for i in range(32 - len(NAMED)))
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# What others call the same thing, where it can mean nothing else.
_SYNONYMS = {
    PAD: ("<pad>", "[PAD]"),
    BOS: ("<s>", "<bos>", "<|begin_of_text|>"),
    EOS: ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    END: ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"),
}

# Of words that were cut, in other kinds of BPE.
_AFFIX = re.compile(r'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')

_NOT_UNICODE = (
    "the text holds bytes that are no UTF-8, or half a surrogate pair (U+D800 to U+DFFF), which is no character: "
    "remove them"
)


def _byte_characters() -> Iterator[str]:
    """The printable stand-in of each byte 0 to 255 (GPT-2's table): itself if printable, else from U+0100 on."""
    unprintable = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield chr(byte)
        else:
            yield chr(unprintable)
            unprintable += 1


_CHARACTER_OF_BYTE = tuple(_byte_characters())
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}
_BYTES_OF_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class Tokenizer:
    """A vocabulary with ids 0 to `vocab_size` - 1. Made by `train`, `from_json` and `from_file`.

    `missing_bytes` are those that texts may hold and no token stands for, in some tokenizers from elsewhere.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # not part of the JSON, so it is set here for every tokenizer
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        if not isinstance(backend.model, models.BPE) or not (self._byte_level or backend.model.byte_fallback):
            raise ValueError(
                f"a {type(backend.model).__name__} vocabulary that does not cover every byte is not supported: "
                "use a byte-level BPE tokenizer"
            )
        backend.model.dropout = None  # of its training: with it a text has other tokens each time
        unknown = backend.model.unk_token
        if unknown is not None and backend.model.token_to_id(unknown) is None:
            backend.model.unk_token = None  # else the library fails at the first letter that it would stand for
        names = _CHARACTER_OF_BYTE if self._byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        self.missing_bytes = frozenset(byte for byte in _BYTES_OF_UTF8 if backend.token_to_id(names[byte]) is None)
        # SentencePiece's convention puts a space before the text and takes it away again.
        space = backend.token_to_id("▁")
        self._drops_first_space = not self._byte_level and space is not None and backend.decode([space, space]) == " "
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self.control_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        controls = {self._added[id]: id for id in sorted(self.control_ids)}
        self.special_ids: dict[str, int] = {}
        for name in SPECIAL_TOKENS:
            found = next((controls[known] for known in (name, *_SYNONYMS.get(name, ())) if known in controls), None)
            if found is not None:
                self.special_ids[name] = found

    @property
    def pad_id(self) -> int | None:
        """None only for another model's tokenizer that has no such token, as with the next two."""
        return self.special_ids.get(PAD)

    @property
    def bos_id(self) -> int | None:
        return self.special_ids.get(BOS)

    @property
    def eos_id(self) -> int | None:
        return self.special_ids.get(EOS)

    # Making one

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens: byte-level BPE (arXiv 1508.07909), or characters."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes need "
                f"at least {SMALLEST_VOCABULARY}"
            )
        if kind not in KINDS:
            raise ValueError(f"a tokenizer of kind {kind!r} is unknown: choose {' or '.join(KINDS)}")
        backend = tokenizers.Tokenizer(models.BPE() if kind == "bpe" else _character_model(texts, vocab_size))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        if kind == "bpe":
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                min_frequency=2,
                special_tokens=list(SPECIAL_TOKENS),
                initial_alphabet=list(_CHARACTER_OF_BYTE),
                show_progress=False,
            )
            backend.train_from_iterator(texts, trainer)
        else:
            backend.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(backend)

    @classmethod
    def from_json(cls, text: str, complete: bool = False) -> Tokenizer:
        """Read the text of a tokenizer.json.

        `complete` appends the special tokens it lacks, for training on it; a model's own tokenizer is left as it is.
        """
        # The library would panic, which is no Exception.
        if (affix := _AFFIX.search(text)) is not None and '"WordPiece"' not in text:
            raise ValueError(f"BPE with {affix[1]} is not supported: use a byte-level BPE tokenizer without")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"not a tokenizer.json ({error})") from None
        tokenizer = cls(backend)
        return tokenizer._completed() if complete else tokenizer

    @classmethod
    def from_file(cls, path: str | Path, complete: bool = False) -> Tokenizer:
        """Read a tokenizer.json. Raises `ValueError` that names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), complete)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be used as a tokenizer: {error}") from None

    def to_json(self) -> str:
        """The text of a tokenizer.json that means the same here and elsewhere."""
        return self._backend.to_str(pretty=True)

    def _completed(self) -> Tokenizer:
        if not self._byte_level:
            raise ValueError("training takes byte-level BPE only, and this is SentencePiece's kind of BPE")
        missing = [name for name in NAMED if name not in self.special_ids]
        taken = [name for name in missing if self._backend.token_to_id(name) is not None]
        if taken:
            raise ValueError(f"{taken[0]} is an ordinary token there, which any text may contain: mark it special")
        count = self._backend.get_vocab_size()
        if count != self.vocab_size:
            raise ValueError(f"{count} tokens have ids up to {self.vocab_size - 1}: number them without gaps")
        bytes_known = sum(self._backend.token_to_id(character) is not None for character in _CHARACTER_OF_BYTE)
        if bytes_known < 256:
            raise ValueError(f"{bytes_known} of the 256 bytes are tokens: train it with the whole byte-level alphabet")
        self._backend.add_special_tokens(missing)
        return Tokenizer(self._backend)

    # Using it

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of a text, none of them a control id; `bos` puts that one in front, if the vocabulary has one.

        What has no token is left out, as by other programs: see `left_out`.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(_NOT_UNICODE) from None
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32, on all cores.

        Raises `ValueError` for what has no token: to learn from, and to be measured by, is the whole text or none.
        """
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise ValueError(_NOT_UNICODE) from None
        for lost in itertools.chain.from_iterable(map(self.left_out, texts)):
            raise ValueError(f"the tokenizer has no tokens for {lost!r}: leave it out, or take another tokenizer")
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def left_out(self, text: str) -> list[str]:
        """The characters of a text for which there are no tokens, each once."""
        if not self.missing_bytes or self.missing_bytes.isdisjoint(text.encode()):
            return []
        return [c for c in dict.fromkeys(text) if not self.missing_bytes.isdisjoint(c.encode())]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD, and ids beyond the vocabulary nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, skip_special: bool = True) -> TextStream:
        """Decoding one id at a time; the parts put together equal `decode` of all of them."""
        return TextStream(self, skip_special, self._drops_first_space)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for: often a part of a character. A special token's are its name's."""
        token = self._backend.id_to_token(int(id))
        if token is None:  # a model may have more rows in its embedding than its tokenizer has tokens
            return b""
        if id in self._added:
            return self._added[id].encode()
        if self._byte_level:
            if _BYTE_OF_CHARACTER.keys() >= set(token):
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            return token.encode()  # not one of the alphabet's, so it stands for itself
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def parts(self) -> np.ndarray:
        """The two tokens that each was merged from, (vocab_size, 2) int64; -1 for bytes and special tokens."""
        model = json.loads(self._backend.to_str())["model"]
        parts = np.full((self.vocab_size, 2), -1, dtype=np.int64)
        for merge in model["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            parts[model["vocab"][first + second]] = model["vocab"][first], model["vocab"][second]
        return parts


class TextStream:
    """Ids in, whole characters out; the bytes of an unfinished character are held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, drop_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special else frozenset()
        self._drop_first_space = drop_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """What can be said for certain after this id, often nothing."""
        if id in self._skipped:
            return ""
        return self._without_first_space(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def flush(self) -> str:
        """U+FFFD for a character that stayed unfinished, else nothing."""
        return self._without_first_space(self._decoder.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if not text or not self._drop_first_space:
            return text
        self._drop_first_space = False
        return text.removeprefix(" ")


def _character_model(texts: Iterable[str], vocab_size: int) -> models.BPE:
    """BPE whose merges only join the bytes of one character, the most frequent characters first.

    "中" is E4 B8 AD and brings the merges (E4, B8) and (E4 B8, AD); "丰", E4 B8 B0, shares the first of them. The
    left side of a merge is always the unfinished beginning of a character, and the byte that follows such a beginning
    is always its own next one. So no merge reaches across characters, though a pre-tokenised piece holds several.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        if not text.isascii():
            counts.update(character for character in text if character > "\x7f")
    vocabulary = {token: id for id, token in enumerate((*SPECIAL_TOKENS, *sorted(_CHARACTER_OF_BYTE)))}
    merges = []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        symbols = "".join(_CHARACTER_OF_BYTE[byte] for byte in character.encode())
        new = [length for length in range(2, len(symbols) + 1) if symbols[:length] not in vocabulary]
        if len(vocabulary) + len(new) > vocab_size:
            break
        for length in new:
            vocabulary[symbols[:length]] = len(vocabulary)
            merges.append((symbols[: length - 1], symbols[length - 1]))
    return models.BPE(vocab=vocabulary, merges=merges)
