"""Drafts: the same text to the last byte, only faster, and none where they don't pay or can't be had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small
from test_native import files_of, model_of

from thinker.decode.native import drafts as module
from thinker.decode.native import open_native
from thinker.decode.native.crew import Crew
from thinker.decode.native.decoder import NativeDecoder
from thinker.decode.native.drafts import LENGTHS, Drafts
from thinker.decode.native.layout import FLOAT32, PANEL, lay_out
from thinker.decode.native.packing import Packed, round_weights
from thinker.formats.q8 import Q8Tensor
from thinker.sampling import Draws, Sampling

PROMPT = [1, 2, 3]
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=7), Sampling(temperature=2)]


@pytest.fixture(params=[1, 3, 7])
def drafting(request, monkeypatch):
    """Drafts from the first token on, always of one length."""
    monkeypatch.setattr(module, "PATIENCE", 0)
    monkeypatch.setattr(Drafts, "_length", lambda _: request.param)
    return request.param


def text_of(decoder, sampling, counts, stop=(), slot=0):
    """A text in as many calls as there are counts, and all that it leaves behind."""
    draws = Draws(decoder.slots, decoder.config.vocab_size)
    draws.begin(slot, sampling, 0, PROMPT)
    decoder.truncate(slot, 0)
    text = [int(draws.draw([slot], decoder.prefill(slot, PROMPT)[None])[0])]
    for count in counts:
        text += decoder.run([slot], text[-1:], draws, count, stop)[0].tolist()
    held = decoder.length(slot)
    after = decoder.step([slot], [4]).tobytes() if held < decoder.config.ctx_len else b""
    return text, held, draws.keys.tolist(), draws.seen.tobytes(), after


def checked(decoder):
    """How many drafted tokens were compared in the last call."""
    return int(decoder._model.job["tried"])


@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe", "everything", "tied"], indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_text_is_what_it_is_without_drafts(config, threads, drafting):
    """Bug: a token is INT8's, a rejected draft's keys stay, or a random number is used twice or left out."""
    config = config.changed(d_ff=64, head_dim=16, ctx_len=64)
    files = files_of(model_of(config))
    plain, quick = NativeDecoder(files, 2, threads=threads, drafts=False), NativeDecoder(files, 2, threads=threads)
    for sampling in SAMPLINGS:
        for counts in ((40,), (1, 2, 30, 5), (61,)):  # the last fills the context
            assert text_of(quick, sampling, counts, slot=1) == text_of(plain, sampling, counts, slot=1)
            assert checked(quick)


def test_drafts_may_follow_embeddings(drafting):
    """Bug: the check takes what is left of a picture's vectors for those of the drafted tokens."""
    config = small("gqa_qk_norm", d_ff=64, head_dim=16)
    files = files_of(model_of(config))
    embeddings = np.random.default_rng(0).normal(size=(9, config.d_model)).astype(np.float32)
    plain, quick = NativeDecoder(files, threads=2, drafts=False), NativeDecoder(files, threads=2)
    for _ in range(2):  # the first measures drafts after the embeddings, the second makes one at once
        written = []
        for decoder in (plain, quick):
            decoder.truncate(0, 0)
            decoder.prefill(0, embeddings=embeddings)
            written.append(decoder.run([0], [4], Draws(1, config.vocab_size), 30).tolist())
        assert written[0] == written[1]
    assert checked(quick)


@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "tied"], indirect=True)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_are_right_where_int8_loses_nothing(config, sampling, drafting):
    """Bug: drafts are drawn with other random numbers, settings or penalties, or attend to keys that aren't there: no
    text shows it, only that it comes no sooner."""
    model = model_of(config.changed(d_ff=64, head_dim=16, ctx_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(np.asarray(Q8Tensor.quantise(parameter.numpy()))))
    decoder = NativeDecoder(files_of(model), threads=1)
    text_of(decoder, sampling, (60,))
    tried, right = (int(decoder._model.job[name]) for name in ("tried", "right"))
    assert right >= 0.95 * tried > 10, (tried, right)


def test_only_the_end_of_a_text_cuts_a_check_short(drafting, monkeypatch):
    """Bug: a call's last check reads all weights for the few tokens that are left of the call, not of the text."""
    wanted, given, write_ahead = 60, [], Crew.write_ahead

    def note(self, model, draft, length, turns, checks, **options):
        write_ahead(self, model, draft, length, turns, checks, **options)
        given.append((wanted - sum(done for *_, done in given), (length + 1) * checks, turns, int(model.job["done"])))

    decoder = NativeDecoder(files_of(model_of(small("dense", d_ff=64, ctx_len=64))), threads=1)
    text_of(decoder, Sampling(), (wanted,))
    monkeypatch.setattr(Crew, "write_ahead", note)
    text_of(decoder, Sampling(), (wanted,))
    assert len(given) > 1
    for left, at_most, turns, _ in given:
        assert at_most <= turns or turns == left, given


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_nothing_is_drawn_behind_the_end_of_a_text(sampling, drafting):
    """Bug: the check draws on behind a drafted stop id, so that a text that goes on all the same is another."""
    config = small("dense", d_ff=64)
    files = files_of(model_of(config))
    plain, quick = NativeDecoder(files, drafts=False), NativeDecoder(files)
    text = text_of(plain, sampling, (40,))[0]
    ended = 0
    for stop in set(text):
        expected = text_of(plain, sampling, (20, 12), {stop})
        assert text_of(quick, sampling, (20, 12), {stop}) == expected
        ended += len(expected[0]) < 33
    assert ended > 2


def test_logits_without_a_finite_number_are_refused(drafting):
    """Bug: a draft of a diverged model loops for ever, or its -1 is taken for a token."""
    config = small("dense", d_ff=64)
    model = model_of(config)
    decoder = NativeDecoder(files_of(model))
    decoder.prefill(0, PROMPT)
    decoder._model.panels.floats[:] = np.nan  # which the draft shares
    with pytest.raises(ValueError, match="no finite number"):
        decoder.run([0], [4], Draws(1, config.vocab_size), 10)


def test_what_is_measured_is_nobodys_text():
    """Bug: measuring draws on behind a text's end, where a damaged model has no logits, and the text is refused."""
    model = model_of(small("dense", d_ff=64, ctx_len=256))
    end = text_of(NativeDecoder(files_of(model), drafts=False), Sampling(), (1,))[0][1]
    with torch.no_grad():
        model.tok_emb.weight[end] = torch.nan
    assert end not in PROMPT
    plain, quick = NativeDecoder(files_of(model), drafts=False), NativeDecoder(files_of(model))
    text, held = text_of(plain, Sampling(), (100,), {end})[:2]
    assert text[-1] == end
    assert text_of(quick, Sampling(), (100,), {end})[:2] == (text, held)
    assert quick.has_drafts


@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe", "tied"], indirect=True)
def test_weights_are_rounded_to_q8_0(config):
    """Bug: the draft has other weights than INT8 has, which no text shows, only that fewer of its tokens are right."""
    config = config.changed(d_ff=64)
    files = files_of(model_of(config))
    layout = lay_out(config, False, 1, FLOAT32)
    size = layout[1].weights if config.tie_embeddings else int(layout[0][0]["at_embedding"])
    rounded = round_weights(Packed(files, *layout), size)
    packed = Packed(files, *lay_out(config, True, 1, FLOAT32))
    assert np.array_equal(rounded.scales, packed.scales[: size // 32])
    used = packed.weights[:size] != 0  # padding, whose bytes say 0 or -128
    assert np.array_equal(rounded.weights[used], packed.weights[:size][used])
    assert np.isin(rounded.weights[~used], [0, -128]).all()
    assert used.mean() > 0.5


@pytest.mark.parametrize(
    "reason", ["not wanted", "INT8", "no whole blocks", "too large for INT8", "no memory", "not alone", "short"]
)
def test_no_drafts_where_they_can_not_be(reason, monkeypatch):
    """Bug: the decoder fails where it only can't be made faster, or takes memory for what isn't used."""
    config = small("dense", d_ff=48 if reason == "no whole blocks" else 64, ctx_len=10 if reason == "short" else 256)
    model = model_of(config)
    if reason == "too large for INT8":
        model.head.weight.data[0, 0] = 1e9
    if reason == "no memory":

        def none_left(*_):
            raise MemoryError("Unable to allocate 2.00 GiB")

        monkeypatch.setattr(module, "round_weights", none_left)
    dtype = "int8" if reason == "INT8" else "float32"
    decoder = NativeDecoder(files_of(model), 2, dtype, drafts=reason != "not wanted")
    draws, slots = Draws(2, config.vocab_size), [0, 1] if reason == "not alone" else [0]
    for _ in range(10):
        for slot in slots:
            decoder.truncate(slot, 0)
            decoder.prefill(slot, PROMPT)
        decoder.run(slots, [4] * len(slots), draws, min(100, config.ctx_len - 4))
    assert not decoder.has_drafts


def test_drafts_come_when_a_text_is_long_enough():
    """Bug: every short answer waits until weights are rounded, or no text ever gets drafts."""
    decoder = open_native(files_of(model_of(small("dense", d_ff=64, ctx_len=256))), threads=1)
    text_of(decoder, Sampling(), (40,))
    assert not decoder.has_drafts
    text_of(decoder, Sampling(), (40, 100))
    assert decoder.has_drafts
    assert set(decoder._drafts._seconds) == {0, *LENGTHS}


def test_a_token_without_drafts_is_measured_apart_from_them(monkeypatch):
    """Bug: a draft's weights push float32's out of the last cache, and drafts only seem quicker."""
    done = []

    def note(name, function):
        def noted(self, *arguments, **options):
            done.append(name)
            return function(self, *arguments, **options)

        return noted

    decoder = open_native(files_of(model_of(small("dense", d_ff=64, ctx_len=256))), threads=1)
    monkeypatch.setattr(Crew, "do", note("alone", Crew.do))
    monkeypatch.setattr(Crew, "write_ahead", note("drafted", Crew.write_ahead))
    monkeypatch.setattr(Crew, "settle", lambda *_: done.clear())
    assert decoder._drafts._prepare(0, 10, 1)
    first = done.index("drafted")
    assert first >= 2
    assert set(done[first:]) == {"drafted"}


def test_a_stall_is_not_measured(monkeypatch):
    """Bug: another program takes a core for an instant, so that drafts, or what they are compared with, are measured
    with one thread, and are too slow or too quick for good."""
    monkeypatch.setattr("thinker.decode.native.crew.processors", lambda: 2)
    monkeypatch.setattr("thinker.decode.native.crew.fastest", lambda choices, *_: list(choices)[-1])
    decoder = NativeDecoder(files_of(model_of(small("dense", d_ff=64, ctx_len=256))))
    threads, hand_out = [], Crew._hand_out

    def note(self, model, *others):
        hand_out(self, model, *others)
        threads.append(int(model.job["threads"]))

    monkeypatch.setattr(Crew, "_hand_out", note)
    decoder._crew._pace.alone_until = float("inf")
    assert decoder._drafts._prepare(0, 10, 1)
    assert set(threads) == {2}


def test_drafts_are_as_long_as_pays():
    """Bug: it drafts on though nothing comes true, or for a gain of 2 %, or gives up for good after one hard text."""
    drafts = object.__new__(Drafts)
    drafts._seconds = {0: 1.0, 3: 1.8, 7: 2.6}
    drafts._tried = 10.0
    for share, length in ((1.0, 7), (0.9, 7), (0.7, 3), (0.52, 3), (0.485, 0), (0.3, 0)):
        drafts._right = 10.0 * share
        assert drafts._length() == length, share
    calls = 0
    while drafts._length() == 0:
        assert drafts.write(0, 10, 4, None, 50, None) is None
        calls += 1
    assert 10 < calls < 100


def test_drafts_attend_to_the_texts_own_keys_and_values(drafting):
    """Bug: they attend to what a slot held before it was cut, or to another's, and little of what they say comes true.

    No byte of a text would show it.
    """
    T, W = 256, 32
    config = small("dense", d_model=2 * W, n_heads=2, d_ff=64, ctx_len=T)
    decoder = NativeDecoder(files_of(model_of(config)), slots=3, threads=2)
    draws = Draws(3, decoder.config.vocab_size)

    def seen(caches, slot, count):
        """A slot's keys and values (layers, heads, count, W), whatever lies in which panel."""
        keys, values = (cache.reshape(3, -1, T * W)[slot] for cache in caches)
        keys = keys.reshape(-1, T // PANEL, W, PANEL).swapaxes(2, 3).reshape(-1, T, W)
        values = values.reshape(-1, W // PANEL, T, PANEL).swapaxes(1, 2).reshape(-1, T, W)
        return np.stack([keys, values])[:, :, :count].copy()

    for slot, keep, count in ((1, 0, 100), (0, 0, 60), (1, 30, 70), (2, 0, 40), (1, 0, 150), (0, 33, 31)):
        decoder.truncate(slot, keep)
        prompt = [3 + slot, 5 + count % 7, 9]
        logits = decoder.prefill(slot, prompt)
        draws.begin(slot, Sampling(temperature=1.0), slot, prompt)
        decoder.run([slot], draws.draw([slot], logits[None]).tolist(), draws, count)
        known = decoder._drafts._narrowed[slot]
        assert keep < known <= decoder.length(slot)
        ours = seen(decoder._drafts._draft.caches, slot, known).view(np.float16)
        assert np.array_equal(ours, seen(decoder._model.caches, slot, known).astype(np.float16))
