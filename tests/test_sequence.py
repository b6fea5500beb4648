"""The splice: exact places, exact counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randomise, small

from thinker import ThinkerLM, Tokenizer
from thinker.chat import ChatFormat
from thinker.modality.sequence import expand, placeholder_ids, splice

PLACEHOLDERS = {"image": 5, "audio": 6}
TOKENIZER = Tokenizer.train(["what is this", "and that"], 300)


def test_each_placeholder_is_repeated_in_its_place():
    """Catches media that are numbered in another order than they stand in, and targets that move against their ids."""
    row = expand([9, 5, 7, 6, 5, 8], [("image", 3), ("audio", 1), ("image", 2)], PLACEHOLDERS)
    assert row.ids.tolist() == [9, 5, 5, 5, 7, 6, 5, 5, 8]
    assert row.media.tolist() == [0, 1, 1, 1, 0, 2, 3, 3, 0]
    assert row.source.tolist() == [0, 1, 1, 1, 2, 3, 4, 4, 5]
    assert expand([1, 2], [], PLACEHOLDERS).ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        ([5, 5], [("image", 2)], "1 pictures for 2 placeholders"),
        ([5], [("image", 2), ("image", 2)], "2 pictures for 1 placeholders"),
        ([1], [("audio", 2)], "1 sounds for 0 placeholders"),
        ([5, 6], [("audio", 2), ("image", 2)], "medium 1 is audio"),
        ([5], [("image", 0)], "0 positions"),
    ],
)
def test_counts_that_do_not_match_are_refused(ids, given, message):
    """Catches a picture that silently takes another one's place, or falls away."""
    with pytest.raises(ValueError) as caught:
        expand(ids, given, PLACEHOLDERS)
    assert message in str(caught.value)


def test_splice_puts_features_in_order_and_leaves_the_rest():
    """Catches features written column by column, into the given array, or with a count or width that is off."""
    for made in (np.zeros((2, 4, 3), np.float32), torch.zeros(2, 4, 3)):
        where = (np if isinstance(made, np.ndarray) else torch).zeros((2, 4)) > 0
        where[0, 1] = where[0, 2] = where[1, 0] = True
        features = 1.0 + np.arange(9, dtype=np.float32).reshape(3, 3)
        features = features if isinstance(made, np.ndarray) else torch.from_numpy(features)
        out = splice(made, where, features)
        assert np.asarray(out[0, 1:3]).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert np.asarray(out[1, 0]).tolist() == [7, 8, 9]
        assert float(out.sum()) == 45
        assert float(made.sum()) == 0
        with pytest.raises(ValueError, match="2 features for 3 placeholders"):
            splice(made, where, features[:2])
        with pytest.raises(ValueError, match="features are 2 wide, the stream is 3"):
            splice(made, where, features[:, :2])


def test_nothing_before_a_picture_depends_on_it():
    """Catches a splice that lets a picture be seen before it has come, or not at all."""
    torch.manual_seed(0)
    model = randomise(ThinkerLM(small("dense", dropout=0.0)).double())
    base = model.tok_emb(torch.tensor([[3, 5, 5, 7, 9]]))
    where = torch.tensor([[False, True, True, False, False]])
    outputs = [model(embeddings=splice(base, where, torch.randn(2, 32).double())) for _ in range(2)]
    assert torch.equal(outputs[0][:, 0], outputs[1][:, 0])
    assert (outputs[0][:, 3] - outputs[1][:, 3]).abs().max() > 1e-3


def test_parts_of_a_message_become_their_tokens():
    """Catches media in another order than given, lost end tokens, and a person's `<|image|>` that becomes control."""
    ids = placeholder_ids(TOKENIZER)
    content = [
        {"type": "text", "text": "a<|image|><|im"},
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "age|>b<|en"},
        {"type": "text", "text": "d|>"},
        {"type": "image", "path": "b.png"},
    ]
    format = ChatFormat(TOKENIZER)
    written = format.encode([{"role": "user", "content": content}])
    control = [i for i in written if i in TOKENIZER.control_ids]
    names = {i: TOKENIZER.token_bytes(i).decode() for i in control}
    assert [names[i] for i in control] == [
        "<|bos|>", "<|user|>", "<|audio_start|>", "<|audio|>", "<|audio_end|>",
        "<|image_start|>", "<|image|>", "<|image_end|>", "<|end|>", "<|assistant|>",
    ]  # fmt: skip
    assert TOKENIZER.decode(written) == "a<|image|><|image|>b<|end|>"
    assert written.count(ids["image"]) == 1
    plain = [{"role": "user", "content": "ab"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert format.encode(plain) == format.encode(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "give a text, or a list of parts"),
        ([{"type": "video", "video": "x"}], "part 1 has type 'video'"),
        ([{"type": "image"}], "needs a text under 'image'"),
        ([{"type": "image", "image": ""}], "needs a text under 'image'"),
        ([{"type": "image", "image": "a.png", "audio": "b"}], "unknown key 'audio'"),
    ],
)
def test_parts_that_are_none_are_refused(content, message):
    """Catches a misspelt part that is dropped in silence."""
    with pytest.raises(ValueError) as caught:
        ChatFormat(TOKENIZER).encode([{"role": "user", "content": content}])
    assert message in str(caught.value)


def test_a_template_that_loses_or_doubles_a_picture_is_refused():
    """Catches a template that writes a content twice: the second picture would have no features."""
    double = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="1 pictures and sounds are in the messages, and the chat template writes 2"):
        ChatFormat(TOKENIZER, double).encode([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}])
    with pytest.raises(ValueError, match="in the assistant's turn"):
        ChatFormat(TOKENIZER).encode([{"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}])
