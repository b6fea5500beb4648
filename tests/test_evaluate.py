from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import small
from hypothesis import given
from hypothesis import strategies as st

from thinker.checkpoint.files import to_json
from thinker.decode.torch_decoder import TorchDecoder
from thinker.evaluate import _windows, evaluate
from thinker.tokenizer import Tokenizer

TEXTS = ["To be, or not to be: that is the question.\n", "é😀 ∀x", "a", "", "Whether 'tis nobler in the mind to suffer"]
SIZE = 43 + (2 + 4 + 1 + 3 + 1) + 1 + 0 + 41  # bytes of UTF-8
BYTES = Tokenizer.train(TEXTS, 288, kind="char")
PIECES = Tokenizer.train(TEXTS * 3, 320)

# The same float64 numbers added in another order.
CLOSE = {"rel": 1e-12}


def model_for(tokenizer, build, name="dense", **fields):
    return build(small(name, vocab_size=tokenizer.vocab_size, **fields))


def by_hand(model, tokenizer, texts):
    """-log p of every token given bos and all tokens before it, one after the other."""
    total = 0.0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        for place in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:place]]))[0, -1]
            total -= float(logits.log_softmax(dim=-1)[ids[place]])
    return total


def test_it_is_the_sum_over_every_token_by_hand(config, build):
    """Catches a shifted target, padding that counts, a mean of means, and dropout."""
    model = build(config.changed(vocab_size=PIECES.vocab_size))
    model.train()
    result = evaluate(model, PIECES, TEXTS, batch=3)
    assert model.training
    model.eval()
    nats, tokens, size = by_hand(model, PIECES, TEXTS), sum(len(PIECES.encode(t)) for t in TEXTS), SIZE
    assert (result.tokens, result.bytes) == (tokens, size)
    assert size == sum(len(text.encode()) for text in TEXTS)
    assert result.loss == pytest.approx(nats / tokens, **CLOSE)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), **CLOSE)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, **CLOSE)


def test_a_loss_that_is_no_number_has_no_perplexity(build):
    """Catches NaN that is reported as infinity, and a report that is no JSON."""
    model = model_for(PIECES, build)
    with torch.no_grad():
        model.head.weight[0] = torch.nan
    result = evaluate(model, PIECES, TEXTS)
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    report = json.loads(to_json(dataclasses.asdict(result) | {"infinite": -math.inf}), parse_constant=pytest.fail)
    assert (report["loss"], report["perplexity"], report["infinite"]) == (None, None, None)
    assert report["tokens"] == result.tokens


@pytest.mark.parametrize("stride", [1, 7, 24, 47, 48])
def test_the_stride_means_nothing_while_the_context_holds_the_text(build, stride):
    """Catches a first window that counts only its last tokens, and a document that loses its beginning."""
    model = model_for(PIECES, build)
    assert max(len(PIECES.encode(text)) for text in TEXTS) <= 48
    assert evaluate(model, PIECES, TEXTS, stride).loss == pytest.approx(evaluate(model, PIECES, TEXTS).loss, **CLOSE)


def test_past_the_context_each_token_is_predicted_from_its_own_window(build):
    """Catches windows that start anew with a bos, count a token twice, or give it less context than promised."""
    model = model_for(BYTES, build, ctx_len=10)
    text = "To be, or not to be: that is the question"
    ids = [BYTES.bos_id, *BYTES.encode(text)]
    total = len(ids) - 1
    for stride in (1, 3, 5, 10):
        nats = 0.0
        for place in range(total):  # the position that predicts ids[place + 1]
            # Worked out anew: the first window ends at 10, each later one `stride` further, the last one at the end.
            end = 10 if place < 10 else min(10 + stride * ((place - 10) // stride + 1), total)
            with torch.no_grad():
                logits = model(torch.tensor([ids[max(end - 10, 0) : place + 1]]))[0, -1]
            nats -= float(logits.log_softmax(dim=-1)[ids[place + 1]])
        result = evaluate(model, BYTES, [text], stride)
        assert result.tokens == total
        assert result.loss == pytest.approx(nats / total, **CLOSE)


@given(length=st.integers(0, 60), ctx_len=st.integers(1, 20), data=st.data())
def test_every_token_and_every_byte_is_counted_once(length, ctx_len, data):
    """Catches gaps and overlaps between windows, and windows longer than the context."""
    stride = data.draw(st.integers(1, ctx_len))
    text = "".join(data.draw(st.lists(st.sampled_from("aé😀"), min_size=length, max_size=length)))
    windows = list(_windows(text, BYTES, BYTES.bos_id, ctx_len, stride))
    counted = np.concatenate([[], *(window.ids[window.first + 1 :] for window in windows)])
    assert counted.tolist() == BYTES.encode(text)
    assert sum(window.bytes for window in windows) == len(text.encode())
    assert all(window.tokens >= 1 and window.first >= 0 and len(window.ids) <= ctx_len + 1 for window in windows)
    assert all(window.first >= ctx_len - stride for window in windows[1:])


def test_a_model_that_knows_nothing_pays_the_same_bits_for_each_token(build):
    """Catches bits taken per character or per token, which can't be compared between tokenizers."""
    for tokenizer in (BYTES, PIECES):
        model = model_for(tokenizer, build)
        torch.nn.init.zeros_(model.head.weight)
        result = evaluate(model, tokenizer, TEXTS)
        assert result.loss == pytest.approx(math.log(tokenizer.vocab_size))
        assert result.bits_per_byte * result.bytes == pytest.approx(result.tokens * math.log2(tokenizer.vocab_size))
        assert result.bytes == SIZE


def test_pieces_of_a_document_are_one_document(build):
    """Catches a bos, or a fresh context, wherever a long file was cut for reading."""
    model = model_for(BYTES, build)
    whole = evaluate(model, BYTES, ["to be or not to be"])
    assert evaluate(model, BYTES, [iter(["to be ", "or not", " to be"])]).loss == pytest.approx(whole.loss, **CLOSE)
    assert evaluate(model, BYTES, ["to be ", "or not", " to be"]).loss != pytest.approx(whole.loss)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_the_batch_means_nothing(build, batch):
    """Catches windows of another length in one batch that see each other's padding, and a last batch left out."""
    model = model_for(PIECES, build, ctx_len=9)
    expected = evaluate(model, PIECES, TEXTS, 4, batch=3)
    result = evaluate(model, PIECES, TEXTS, 4, batch=batch)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    assert result.loss == pytest.approx(expected.loss, **CLOSE)


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_a_decoder_gives_the_same_figures(build, name, monkeypatch):
    """Catches a slot that isn't emptied between windows, and context that counts."""
    monkeypatch.setattr("thinker.evaluate.ROWS_AT_ONCE", 4)
    model = model_for(PIECES, build, name, ctx_len=13)
    decoder = TorchDecoder(model, slots=2)
    decoder.prefill(0, [5, 6])
    expected, result = evaluate(model, PIECES, TEXTS, 5), evaluate(decoder, PIECES, TEXTS, 5)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    # A decoder answers in float32: each logit is off by half a unit in its last place, 2^-24 of its size of a few.
    assert result.loss == pytest.approx(expected.loss, abs=4 * 2**-24 * 8)
    assert decoder.length(0) == 0


def test_a_document_can_begin_with_another_token(build):
    """Catches a model from elsewhere whose bos is not the tokenizer's, and one that has eos alone."""
    model = model_for(BYTES, build)
    losses = {start: evaluate(model, BYTES, ["ab"], start_id=start).loss for start in (None, 1, 2)}
    assert losses[None] == losses[1] != losses[2]


def test_progress_adds_up_to_all_bytes(build):
    """Catches a bar that stops short of its end or runs past it."""
    done: list[int] = []
    result = evaluate(model_for(BYTES, build, ctx_len=7), BYTES, TEXTS, batch=2, progress=done.append)
    assert len(done) > 3
    assert sum(done) == result.bytes == SIZE


def test_autocast_of_a_training_run_does_not_reach_in(build):
    """Catches an evaluation in bfloat16 because it was called from training."""
    model = model_for(BYTES, build).float()
    expected = evaluate(model, BYTES, TEXTS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(model, BYTES, TEXTS).loss == expected


def test_what_cannot_be_evaluated_is_refused(build):
    """Catches a division by zero, and windows that leave tokens out."""
    model = model_for(BYTES, build)
    with pytest.raises(ValueError, match="stride is 49: choose 1 to 48"):
        evaluate(model, BYTES, ["a"], stride=49)
    with pytest.raises(ValueError, match="stride is 0"):
        evaluate(model, BYTES, ["a"], stride=0)
    with pytest.raises(ValueError, match="no text to evaluate"):
        evaluate(model, BYTES, ["", ""])


def test_the_default_stride_fits_the_shortest_context(build):
    """Catches half of one, which is no stride."""
    assert evaluate(model_for(BYTES, build, ctx_len=1), BYTES, ["abc"]).tokens == 3
