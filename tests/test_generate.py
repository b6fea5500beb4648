"""The engine without a model: decoders here play scripts, or draw logits from a hash of what they hold."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from thinker.config import ThinkerConfig
from thinker.decode.decoder import Decoder, check_room, check_slots, check_tokens
from thinker.generate import Engine, Generation, Request
from thinker.sampling import Sampling
from thinker.stop_strings import StopStrings
from thinker.tokenizer import Tokenizer

BYTES = Tokenizer.train([], 288, kind="char")  # a token is a byte, "é" are two
EOS = frozenset({BYTES.eos_id})


class Scripted(Decoder):
    """Holds tokens and writes `script` behind them. Counts what it is asked for, and refuses what no decoder takes."""

    def __init__(self, script: str | list[int] = "", slots: int = 1, ctx_len: int = 100) -> None:
        self.config, self.slots = ThinkerConfig(vocab_size=288, ctx_len=ctx_len), slots
        self.script = BYTES.encode(script) if isinstance(script, str) else script
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.prompts: list[int] = [0] * slots
        self.prefilled: list[list[int]] = []

    def length(self, slot):
        return len(self.held[slot])

    def truncate(self, slot, length):
        assert 0 <= length <= len(self.held[slot])
        del self.held[slot][length:]

    def prefill(self, slot, tokens=None, embeddings=None, *, every=False):
        new = [0] * len(embeddings) if tokens is None else check_tokens(self.config, tokens).tolist()
        check_room(self.config, len(self.held[slot]), len(new))
        self.prefilled.append(new)
        self.held[slot] += new
        self.prompts[slot] = len(self.held[slot])
        return self.logits(slot)

    def step(self, slots, tokens):
        for slot, token in zip(check_slots(self.slots, slots), check_tokens(self.config, tokens), strict=True):
            check_room(self.config, len(self.held[slot]), 1)
            self.held[slot].append(int(token))
        return np.stack([self.logits(slot) for slot in slots])

    def logits(self, slot):
        place = len(self.held[slot]) - self.prompts[slot]
        logits = np.zeros(288, np.float32)
        logits[self.script[place % len(self.script)]] = 1
        return logits


class Hashed(Scripted):
    """Every next token is uncertain, and depends on everything that the slot holds."""

    def __init__(self, slots: int = 1, ctx_len: int = 100) -> None:
        super().__init__([0], slots, ctx_len)

    def logits(self, slot):
        digest = hashlib.sha256(bytes(str(self.held[slot]), "ascii")).digest()
        return np.random.default_rng(list(digest)).normal(0, 3, 288).astype(np.float32)


def request(prompt: str = "go", **fields) -> Request:
    return Request(tuple(BYTES.encode(prompt)), **fields)


def pieces_of(decoder: Decoder, *requests: Request, **options) -> list[list[str]]:
    texts: list[list[str]] = [[] for _ in requests]
    for piece in Engine(decoder, BYTES).run(requests, **options):
        texts[piece.place].append(piece.text)
    return texts


def results_of(engine: Engine, *requests: Request, **options) -> list[Generation]:
    results = {piece.place: piece.result for piece in engine.run(requests, **options) if piece.result is not None}
    assert sorted(results) == list(range(len(requests)))
    return [results[place] for place in range(len(requests))]


def result_of(decoder: Decoder, *requests: Request, **options) -> Generation:
    (result,) = results_of(Engine(decoder, BYTES), *requests, **options)
    return result


# Where a text ends


def test_a_stop_string_that_is_split_over_tokens_ends_the_text_before_it():
    """Catches the search in single tokens, and the first half of a stop string that was shown already."""
    for stop in ("STOP", "S"):
        result = result_of(Scripted("one, two STOP three"), request(stop=(stop,)))
        assert (result.text, result.finish_reason) == ("one, two ", "stop")
    (texts,) = pieces_of(Scripted("one, two STOP three"), request(stop=("STOP",)))
    assert "".join(texts) == "one, two "


def test_the_beginning_of_a_stop_string_comes_out_when_it_was_none():
    """Catches held back text that is lost, in the middle of a text and at its end."""
    result = result_of(Scripted("a STOGIE, a STO"), request(stop=("STOP",), max_new_tokens=15))
    assert (result.text, result.finish_reason) == ("a STOGIE, a STO", "length")
    assert result_of(Scripted([*BYTES.encode("STO"), BYTES.eos_id]), request(stop=("STOP",), eos_ids=EOS)).text == "STO"


def test_only_what_may_become_a_stop_string_waits():
    """Catches a stream that runs late by the length of the longest stop string."""
    scanner = StopStrings(("xxxxxx", "d!"))
    assert [scanner.push(character) for character in "abcdef"] == ["a", "b", "c", "", "de", "f"]


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    text=st.text("abc", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=8),
)
@example(stop=["abb", "b"], text="abb", cuts=[])
def test_where_a_text_stops_does_not_depend_on_its_tokens(stop, text, cuts):
    """Catches two stop strings that overlap, one of which wins only because of where a token ended."""
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    expected = text
    if ends:
        longest = max(len(one) for one in stop if text[: ends[0]].endswith(one))
        expected = text[: ends[0] - longest]
    scanner, said = StopStrings(stop), ""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(borders):
        said += scanner.push(text[begin:end])
        assert text.startswith(said)
        if scanner.found:
            break
    assert scanner.found == bool(ends)
    assert said + scanner.flush() == expected


def test_eos_ends_the_text_and_is_not_in_it():
    """Catches an eos that is shown, one that is generated past, and one that counts where it shall be ignored."""
    script = [*BYTES.encode("ab"), BYTES.eos_id, *BYTES.encode("cd")]
    decoder = Scripted(script)
    result = result_of(decoder, request(eos_ids=EOS))
    assert (result.text, result.finish_reason, result.tokens) == ("ab", "eos", tuple(script[:3]))
    assert decoder.held[0] == BYTES.encode("goab"), "what follows the end was computed for nobody"
    result = result_of(Scripted(script), request(max_new_tokens=5))
    assert (result.text, result.finish_reason) == ("abcd", "length")
    result = result_of(Scripted([BYTES.eos_id]), request(eos_ids=EOS))
    assert (result.text, result.finish_reason, len(result.tokens)) == ("", "eos", 1)


@pytest.mark.parametrize("length", [1, 2, 63, 64])
def test_max_new_tokens_is_met_exactly(length):
    """Catches one token too many or too few, at the first token and at the end of a burst."""
    decoder = Scripted("abc")
    result = result_of(decoder, request(max_new_tokens=length))
    assert result.text == ("abc" * 30)[:length]
    assert (result.finish_reason, result.context_full, result.prompt_tokens) == ("length", False, 2)
    assert decoder.length(0) == 2 + length - 1, "the last token was drawn, and nobody asked what follows it"


def test_the_end_of_the_context_ends_the_text_and_says_so():
    """Catches a step beyond the context, and a text cut short in silence."""
    result = result_of(Scripted("abc", ctx_len=10), request(max_new_tokens=20))
    assert (result.text, result.finish_reason, result.context_full) == ("abcabcab", "length", True)
    result = result_of(Scripted("abc", ctx_len=10), request(max_new_tokens=8))
    assert (len(result.tokens), result.context_full) == (8, False)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs():
    """Catches a second prompt that fails when the first one has been written already."""
    decoder = Scripted("abc", ctx_len=10)
    with pytest.raises(ValueError, match=r"the prompt has 10 tokens .* ctx_len 10"):
        Engine(decoder, BYTES).run([request(), request("0123456789")])
    with pytest.raises(ValueError, match="the prompt is empty"):
        Engine(decoder, BYTES).run([request("")])
    assert decoder.prefilled == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"embeddings": np.zeros((1, 256))}, "tokens or embeddings, got both"),
    ],
)
def test_requests_that_mean_nothing_are_refused(fields, message):
    """Catches a text of no tokens, an empty stop string that stops everything, and a prompt given twice."""
    with pytest.raises(ValueError, match=message):
        request(**fields)


# What a text says


def test_a_character_is_never_cut():
    """Catches replacement characters in a stream: an emoji is four tokens here."""
    (texts,) = pieces_of(Scripted("é😀!"), request(max_new_tokens=7))
    assert "".join(texts) == "é😀!"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_a_character_that_stays_unfinished_is_marked_at_the_end():
    """Catches bytes that vanish when the length is reached in the middle of a character."""
    assert result_of(Scripted("a😀"), request(max_new_tokens=3)).text == "a\N{REPLACEMENT CHARACTER}"


def test_the_prompt_s_characters_are_not_part_of_the_text():
    """Catches a stream that was warmed up with the prompt and says its end again."""
    assert result_of(Scripted("x"), request("é", max_new_tokens=2)).text == "xx"


def test_the_space_between_prompt_and_text_is_kept():
    """Catches SentencePiece's first space, dropped as if the continuation were a text of its own."""
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    backend = tokenizers.Tokenizer(models.BPE(pieces, [("▁", "a")], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    engine = Engine(Scripted([258]), tokenizer)
    (result,) = results_of(engine, Request((258,), max_new_tokens=2))
    assert result.text == " a a"


def test_echo_puts_the_prompt_in_front_once():
    """Catches a prompt that is repeated in every piece, or searched for stop strings."""
    (texts,) = pieces_of(Scripted("abc"), request("go", max_new_tokens=3, echo="go", stop=("o",)))
    assert "".join(texts) == "goabc"
    assert texts[0].startswith("go")
    assert result_of(Scripted("abc"), request("go", max_new_tokens=3, echo="go")).text == "goabc"


def test_an_embedded_prompt_is_continued():
    """Catches embeddings that are counted as no prompt at all, and a slot that is later taken for known tokens."""
    engine = Engine(Scripted("abc"), BYTES)
    (result,) = results_of(engine, Request(embeddings=np.zeros((4, 256)), max_new_tokens=3))
    assert (result.text, result.prompt_tokens) == ("abc", 4)
    (result,) = results_of(engine, Request((0, 0, 0, 0, 0), max_new_tokens=3), reuse=True)
    assert (result.text, result.reused_tokens) == ("abc", 0)


# Company


@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_a_text_is_the_same_alone_and_in_company(slots):
    """Catches draws, penalties, limits and stop strings that leak between slots, and prompts that lose their place."""
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=7)
    requests = [
        request(prompt, sampling=sampling, max_new_tokens=length, stop=stop, eos_ids=EOS)
        for prompt, length, stop in [("a", 30, ()), ("bb", 3, ("e",)), ("ccc", 25, ("q",)), ("d", 1, ()), ("e", 40, ())]
    ]
    alone = [result_of(Hashed(), one) for one in requests]
    assert len({one.tokens for one in alone}) == 5
    together = results_of(Engine(Hashed(slots), BYTES), *requests)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)


def test_slots_are_filled_again_as_soon_as_they_are_free():
    """Catches a queue that waits for the slowest text of a group, and more prompts at once than there are slots."""
    decoder = Scripted("abc", slots=2)
    order = []
    requests = [request(max_new_tokens=length) for length in (40, 2, 2, 2)]
    for piece in Engine(decoder, BYTES).run(requests):
        if piece.result is not None:
            order.append(piece.place)
    assert order == [1, 2, 3, 0]


def test_a_text_s_seconds_are_those_of_its_own_calls(monkeypatch):
    """Catches a speed that sinks when whoever reads the text pauses, or when others' prompts are computed between."""
    now = [0.0]
    monkeypatch.setattr("thinker.generate.time.perf_counter", lambda: now[0])

    class Clocked(Scripted):
        def prefill(self, slot, tokens=None, embeddings=None, *, every=False):
            now[0] += 16
            return super().prefill(slot, tokens)

        def step(self, slots, tokens):
            now[0] += 0.25
            return super().step(slots, tokens)

    speeds = {}
    for piece in Engine(Clocked("abc", slots=2), BYTES).run([request(max_new_tokens=n) for n in (21, 5, 9)]):
        now[0] += 64
        if piece.result is not None:
            speeds[piece.place] = piece.result.prefill_seconds, piece.result.tokens_per_second
    assert speeds == dict.fromkeys(range(3), (16, 4))


def test_seed_and_number_tell_texts_apart_and_nothing_else_does():
    """Catches a generator that goes on from the last text, and eight equal answers to the same prompt."""

    def text(seed, number):
        sampling = Sampling(temperature=1.0, seed=seed)
        return result_of(Hashed(), request(sampling=sampling, number=number)).text

    assert text(0, 0) == text(0, 0)
    assert len({text(0, 0), text(1, 0), text(0, 1)}) == 3


def test_the_penalty_counts_the_prompt_of_its_own_text():
    """Catches a penalty that knows only what was generated, or the prompt of the slot's last text."""
    engine = Engine(Scripted("a"), BYTES)
    sampling = Sampling(repetition_penalty=1e9)

    def two_candidates(slot):
        logits = np.full(288, -1, np.float32)
        logits[BYTES.encode("ab")] = 1, 0.5
        return logits

    engine.decoder.logits = two_candidates
    for prompt, expected in (("a", "b"), ("x", "a"), ("b", "a"), ("xab", "a")):
        (result,) = results_of(engine, request(prompt, sampling=sampling, max_new_tokens=1))
        assert result.text == expected


# What slots hold


def test_a_conversation_goes_on_from_what_is_held():
    """Catches a prefix that is computed again, one that isn't equal and is kept, and a prompt without logits."""
    decoder = Scripted("abc")
    engine = Engine(decoder, BYTES)
    (first,) = results_of(engine, request("hello ", max_new_tokens=5), reuse=True)
    assert first.text == "abcab"
    (second,) = results_of(engine, request("hello abcab? ", max_new_tokens=3), reuse=True)
    assert (second.text, second.reused_tokens, second.prompt_tokens) == ("abc", 10, 13)
    assert BYTES.decode(decoder.prefilled[-1]) == "b? ", "the fifth token was drawn and never held"
    (third,) = results_of(engine, request("help", max_new_tokens=1), reuse=True)
    assert (third.reused_tokens, BYTES.decode(decoder.prefilled[-1])) == (3, "p")
    (again,) = results_of(engine, request("help", max_new_tokens=1), reuse=True)
    assert (again.reused_tokens, BYTES.decode(decoder.prefilled[-1])) == (3, "p")
    (fresh,) = results_of(engine, request("help", max_new_tokens=1))
    assert (fresh.reused_tokens, BYTES.decode(decoder.prefilled[-1])) == (0, "help")


def test_a_text_is_not_written_over_a_conversation_while_other_slots_are_free():
    """Catches a conversation that is computed anew after every other text, and plain texts that use up all slots."""
    decoder = Scripted("abc", slots=4)
    engine = Engine(decoder, BYTES)
    for turns in (1, 2, 3):
        talks = [request(f"I'm {who}. " * turns, max_new_tokens=1) for who in ("Ada", "Bob")]
        reused = [results_of(engine, talk, reuse=True)[0].reused_tokens for talk in talks]
        results_of(engine, request("plain", max_new_tokens=1))
        assert reused == [9 * (turns - 1)] * 2, "four tokens of Ada's first turn are Bob's too: not worth five"
    assert [decoder.length(slot) for slot in range(4)] == [27, 27, 5, 0]


def test_what_was_written_in_company_is_held_too():
    """Catches a memory that knows only the prompts of texts that were written together."""
    engine = Engine(Scripted("abc", slots=2), BYTES)
    results_of(engine, request("first", max_new_tokens=4), request("second", max_new_tokens=4))
    again = results_of(
        engine, request("secondabcx", max_new_tokens=1), request("firstabcx", max_new_tokens=1), reuse=True
    )
    assert [result.reused_tokens for result in again] == [9, 8]


def test_what_was_computed_past_a_stop_string_is_held_but_not_said():
    """Catches bursts whose surplus is counted as text, or forgotten and then attended to."""
    decoder = Hashed()
    engine = Engine(decoder, BYTES)
    sampling = Sampling(temperature=1.0)
    (plain,) = results_of(engine, request(sampling=sampling, max_new_tokens=60))
    stop = plain.text[20:23]
    (stopped,) = results_of(engine, request(sampling=sampling, max_new_tokens=60, stop=(stop,)))
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert len(stopped.tokens) < 60
    prompt = "go" + plain.text[:5]
    (reused,) = results_of(engine, request(prompt, sampling=sampling), reuse=True)
    (fresh,) = results_of(Engine(Hashed(), BYTES), request(prompt, sampling=sampling))
    assert reused.reused_tokens > 0
    assert reused.tokens == fresh.tokens


def test_a_newer_text_takes_the_slots_and_the_older_one_says_so():
    """Catches two streams over one cache, each writing into the other's text."""
    engine = Engine(Scripted("abc"), BYTES)
    older = engine.run([request(max_new_tokens=50)])
    assert next(older).text == "a"
    assert results_of(engine, request(max_new_tokens=4))[0].text == "abca"
    with pytest.raises(ValueError, match="interrupted by a newer one"):
        list(older)


def test_threads_that_share_an_engine_take_turns():
    """Catches two threads that wait for each other inside of one decoder for ever, or write into each other's text."""
    begun, together = threading.Event(), []

    class Slow(Scripted):
        busy = False

        def logits(self, slot):
            together.append(self.busy)
            self.busy = True
            begun.set()
            time.sleep(0.01)  # the other thread comes here meanwhile, if nothing holds it
            self.busy = False
            return super().logits(slot)

    engine = Engine(Slow("abc"), BYTES)

    def overtaken():
        with pytest.raises(ValueError, match="interrupted by a newer one"):
            list(engine.run([request(max_new_tokens=90)]))

    with ThreadPoolExecutor() as pool:
        other = pool.submit(overtaken)
        assert begun.wait(10)
        assert results_of(engine, request(max_new_tokens=9))[0].text == "abcabcabc"
        other.result()
    assert not any(together)


def test_an_interrupted_prompt_is_not_taken_for_the_one_before():
    """Catches a slot with another text's first tokens, just as many as the text before had, which is gone on from."""

    class Interruptible(Scripted):
        def prefill(self, slot, tokens=None, embeddings=None, *, every=False):
            if len(tokens) > 11:
                super().prefill(slot, tokens[:5])
                raise KeyboardInterrupt
            return super().prefill(slot, tokens)

    engine = Engine(Interruptible("abc"), BYTES)
    results_of(engine, request("hello", max_new_tokens=1), reuse=True)
    with pytest.raises(KeyboardInterrupt):
        results_of(engine, request("another prompt", max_new_tokens=1), reuse=True)
    (result,) = results_of(engine, request("hello there", max_new_tokens=3), reuse=True)
    assert (result.text, result.reused_tokens) == ("abc", 0)


def test_a_decoder_that_was_lent_is_begun_anew():
    """Catches a text that goes on in a slot that something else has used meanwhile."""
    engine = Engine(Scripted("abc"), BYTES)
    older = engine.run([request(max_new_tokens=50)])
    next(older)
    with engine.lend():
        pass
    with pytest.raises(ValueError, match="interrupted by a newer one"):
        next(older)
    (result,) = results_of(engine, request("hello", max_new_tokens=3), reuse=True)
    assert result.reused_tokens == 0


def test_a_decoder_that_fails_midway_leaves_nothing_half_known():
    """Catches the memory of a call that was interrupted, taken for what the slot holds."""
    decoder = Scripted("abc")
    engine = Engine(decoder, BYTES)
    results_of(engine, request("hello", max_new_tokens=3), reuse=True)
    decoder.held[0].append(5)  # as if a step had been interrupted behind its last instruction
    (result,) = results_of(engine, request("hello there", max_new_tokens=3), reuse=True)
    assert (result.text, result.reused_tokens) == ("abc", 0)
