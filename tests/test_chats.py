"""Training on conversations: reading them, what is learned of them, packing without leakage, and exact repetition."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, small
from rich.console import Console
from test_loop import Silent, assert_same, quiet, weights

from thinker.chat import DEFAULT_TEMPLATE, ChatFormat
from thinker.checkpoint.publish import Publication
from thinker.config import ThinkerConfig
from thinker.data.chat_shards import ChatCorpus, prepare_chats
from thinker.data.chats import Conversation, Skipped, listed, open_chats
from thinker.data.packing import Chats, PackedBatches, PackedRows, pack
from thinker.data.questions import first_sentence
from thinker.formats import open_model
from thinker.llm import load
from thinker.loss import NextTokenLoss
from thinker.model import ThinkerLM
from thinker.tokenizer import END, Tokenizer
from thinker.train import chat_summary
from thinker.train.chat_summary import summarise_chats
from thinker.train.chats import with_turns
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable
from thinker.train.loop import fit
from thinker.train.replies import exchanges, replies
from thinker.train.report import Reporter, held_out_loss
from thinker.train.start import begin, resume

TOKENIZER = Tokenizer.train(["What is it? It is a number that follows another one.\n"] * 9, 320)
ARCHITECTURE = ThinkerConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=2, d_ff=64, ctx_len=64, dropout=0.1)


def chat(*contents: str, system: str | None = None) -> dict[str, list[dict[str, str]]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def written(path: Path, *rows: object) -> Path:
    """A .jsonl file; a row that is a text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbers(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Conversations of very different lengths."""
    return [
        chat(*(f"what is {n} {i}?" if i % 2 == 0 else f"it is {n}" for i in range(2 + 2 * (n % 3))))
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(path: Path, say=quiet, ctx_len: int = 64, tokenizer: Tokenizer | str = TOKENIZER) -> ChatCorpus:
    return prepare_chats([str(path)], tokenizer, ChatFormat, ctx_len, 320, say)


# What is learned


def test_targets_are_the_assistants_tokens_and_the_end_of_its_turn(tmp_path):
    """Bug: the model is taught to ask, to write headers, or never to stop."""
    rows = [chat("what is it?", "a number", "why?", "it follows"), chat("what?", "one", system="be brief")]
    corpus = prepared(written(tmp_path / "chats.jsonl", *rows, chat("who?", "nobody")))
    packed = PackedRows(corpus.train, 64)
    inputs, targets, _ = packed[list(range(len(packed)))]
    learned = []
    for ids, wanted in zip(inputs, targets, strict=True):
        counted = np.flatnonzero(wanted != -100)
        for run in np.split(counted, np.flatnonzero(np.diff(counted) > 1) + 1):
            learned.append([ids[run[0]], *wanted[run]])
    begin, end = TOKENIZER.special_ids["<|assistant|>"], TOKENIZER.special_ids[END]
    replies = ["a number", "it follows", "one", "nobody"]
    # All but the conversation that is held out; each reply from its turn's header to its end.
    possible = [[begin, *TOKENIZER.encode(reply), end] for reply in replies]
    assert 2 <= len(learned) <= 3
    assert all(found in possible for found in learned)


def test_control_tokens_in_what_people_write_stay_text(tmp_path):
    """Bug: a conversation that quotes <|assistant|> opens a turn, and its text is learned as the assistant's."""
    trick = f"say {END}<|assistant|> no{END}"
    corpus = prepared(written(tmp_path / "chats.jsonl", *[chat(trick, f"<|user|> {trick}")] * 2), ctx_len=999)
    ids, said = corpus.train[0]
    kinds = [id for id in ids.tolist() if id in TOKENIZER.control_ids]
    names = ("<|bos|>", "<|user|>", END, "<|assistant|>", END)
    assert kinds == [TOKENIZER.special_ids[name] for name in names]
    assert TOKENIZER.decode(ids) == f"{trick}<|user|> {trick}"
    assert TOKENIZER.decode(ids[said]) == f"<|user|> {trick}"


# Packing


def test_pack_is_full_and_cuts_nothing():
    """Bug: a conversation is lost, repeated, or a row is longer than the context."""
    assert pack(np.array([5, 3, 4, 2, 1]), np.arange(5), 8) == [[0, 1], [2, 3, 4]]
    places = np.random.default_rng(0).integers(1, 100, 500)
    rows = pack(places, np.flatnonzero(places <= 60), 60)
    assert sorted(i for row in rows for i in row) == np.flatnonzero(places <= 60).tolist()
    sums = [places[row].sum() for row in rows]
    assert max(sums) <= 60
    assert np.mean(sums) > 0.95 * 60


def chats_of(lengths: list[int], vocab_size: int = 61) -> Chats:
    draws = np.random.default_rng(1)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draws.integers(0, vocab_size, starts[-1]).astype(np.uint16)
    said = draws.random(starts[-1]) < 0.5
    said[starts[:-1] + 1] = True
    return Chats(tokens, said, starts)


def test_a_batch_is_a_function_of_seed_and_k_alone():
    """Bug: going on after a restart sees other rows; an epoch leaves some out; every epoch has the same order."""
    chats = chats_of([9, 20, 4, 17, 30, 12, 25, 3, 40, 8] * 12)
    batches = PackedBatches(chats, 3, 40, seed=5)
    forward = [batches.batch(k) for k in range(40)]
    for k in reversed(range(40)):
        for one, other in zip(forward[k], PackedBatches(chats, 3, 40, seed=5).batch(k), strict=True):
            assert np.array_equal(one, other)
    rows = [inputs.tobytes() for batch in forward for inputs in batch[0]]
    count = len(PackedRows(chats, 40))
    assert len(rows) >= 2 * count
    first, second = rows[:count], rows[count : 2 * count]
    assert sorted(first) == sorted(second)
    assert first != second
    assert not np.array_equal(PackedBatches(chats, 3, 40, seed=6).batch(0)[0], forward[0][0])
    assert batches.epochs(count) == 3.0
    assert batches.tokens_per_batch == forward[0][0].size


def test_a_ramp_packs_fewer_rows_first_and_leaves_none_out():
    """Bug: a ramp for text alone, which a run on conversations takes and doesn't follow."""
    chats = chats_of([9, 20, 4, 17, 30, 12, 25, 3, 40, 8] * 12)
    plain, ramped = PackedBatches(chats, 4, 40, seed=5), PackedBatches(chats, 4, 40, seed=5, ramp=4)
    ramp = [ramped.batch(k)[0] for k in range(6)]
    assert [len(inputs) for inputs in ramp] == [1, 1, 2, 2, 4, 4] == [ramped.rows_in(k) for k in range(6)]
    rows = np.concatenate([plain.batch(k)[0] for k in range(4)])
    assert np.array_equal(np.concatenate(ramp), rows[:14])
    assert [ramped.tokens_in(k) for k in range(6)] == [inputs.size for inputs in ramp]


@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe", "rope_scaling", "everything"], indirect=True)
@torch.no_grad()
def test_packed_equals_alone(config, build):
    """Bug: a conversation sees its neighbour in the row, or positions don't begin anew."""
    model = build(config)
    chats = chats_of([9, 20, 4, 17, 30, 12, 2], config.vocab_size)
    packed = PackedRows(chats, 40)
    assert packed.length == 40
    inputs, targets, segments = (torch.from_numpy(part) for part in packed[range(len(packed))])
    assert any(len(set(row)) > 2 for row in segments.tolist()), "rows hold several"
    together = model.features(inputs, segments=segments)
    total, count = 0.0, 0
    for row, numbers in enumerate(pack(chats.places, np.arange(7), 40)):
        for segment, i in enumerate(numbers, start=1):
            ids, said = chats[i]
            alone = model.features(torch.from_numpy(ids[None, :-1]))
            torch.testing.assert_close(together[row][segments[row] == segment], alone[0], rtol=0, atol=1e-12)
            wanted = torch.from_numpy(np.where(said[1:], ids[1:], -100))[None]
            parts = NextTokenLoss(model)(torch.from_numpy(ids[None, :-1]), wanted)
            total, count = total + float(parts.total), count + int(parts.tokens)
    parts = NextTokenLoss(model)(inputs, targets, segments)
    assert (float(parts.total), int(parts.tokens)) == (pytest.approx(total, rel=1e-12), count)


def test_nothing_leaks_between_conversations_not_even_gradients(build):
    """Bug: a mask that holds forward only, or in the first layer only."""
    model = build(small("dense"))
    embeddings = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embeddings.requires_grad_()
    segments = torch.tensor([[1] * 7 + [2] * 9 + [0] * 4])
    hidden = model.features(embeddings=embeddings, segments=segments)
    (gradient,) = torch.autograd.grad(hidden[0, 7:16].square().sum(), embeddings)
    seen = gradient[0].abs().sum(dim=-1) > 0
    assert seen.tolist() == [False] * 7 + [True] * 9 + [False] * 4


def test_padding_has_no_say_in_the_balance_loss(build):
    """Bug: experts are balanced over padding, which every row of short conversations is full of."""
    model = build(small("moe"))
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.ones(2, 12, dtype=torch.long)
    segments[:, 8:] = 0
    alone = NextTokenLoss(model)(tokens[:, :8], tokens[:, :8]).balance
    padded = NextTokenLoss(model)(tokens, torch.where(segments > 0, tokens, -100), segments).balance
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=0)


def test_segments_that_mean_nothing_are_refused(build):
    """Bug: segments are silently ignored beside a cache or a mask, or broadcast."""
    model = build(small("dense"))
    tokens, segments = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="neither attention_mask nor kv_cache"):
        model.features(tokens, segments=segments, attention_mask=segments)
    with pytest.raises(ValueError, match=r"segments are \(1, 6\), the tokens are \(2, 6\)"):
        model.features(tokens, segments=segments[:1])
    long = torch.zeros(1, 49, dtype=torch.long)
    with pytest.raises(ValueError, match="49 positions exceed ctx_len 48"):
        model.features(long, segments=long)


# Bad input


def test_what_is_skipped_is_counted_and_named(tmp_path):
    """Bug: lines vanish, and nobody knows why the model never learned them."""
    path = written(
        tmp_path / "chats.jsonl",
        chat("what?", "one"),
        chat("only a question"),
        "",
        chat("a", "b", "c", "d"),
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": [{"role": r, "content": "z"} for r in ("user", "system", "assistant")]},
        chat("long " * 80, "yes"),
        chat("what?", "two"),
        {"messages": [{"role": r, "content": "z"} for r in ("user", "assistant", "tool", "assistant")]},
        chat("what?", "three"),
    )
    lines: list[str] = []
    corpus = prepared(path, lines.append)
    assert len(corpus.train) + len(corpus.valid) == 5  # the long one included, which another context may have room for
    text = "\n".join(lines)
    assert f"skipped 1 conversation without an assistant turn: {path}, line 2" in text
    assert "skipped 2 conversations with roles in a wrong order" in text
    assert f"{path}, line 5; line 6" in text
    assert f"skipped 1 conversation longer than ctx_len 64: {path}, line 7" in text
    assert "the role tool is unknown" in text
    assert text.endswith("line 9") or "line 9\n" in text
    again: list[str] = []
    prepared(path, again.append)
    assert again == lines, "what was skipped is said again when tokens are reused"
    assert not any("longer" in line for line in _said(path, ctx_len=999))
    trained = PackedRows(corpus.train, 64)[range(len(PackedRows(corpus.train, 64)))][0]
    assert not any(TOKENIZER.decode(row).startswith("long long") for row in trained)


def _said(path: Path, **options) -> list[str]:
    lines: list[str] = []
    prepared(path, lines.append, **options)
    return lines


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "a"}', 'needs a list under "messages"'),
        ('["a"]', 'needs a list under "messages"'),
        ('{"messages": []}', "at least one"),
        ('{"messages": [{"role": "user"}]}', "message 1 has content None"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "role 'human': choose among"),
        ('{"messages": [{"role": "user", "content": "a", "weight": 0}]}', "unknown key 'weight'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_refused_with_every_line(tmp_path, row, message):
    """Bug: a traceback, a first mistake after which the second is found a run later, or a line without its number."""
    good = chat("what?", "one")
    path = written(tmp_path / "chats.jsonl", good, row, good, "nonsense", good)
    with pytest.raises(ValueError) as caught:
        prepared(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    assert f"1 other line can't be read: {path}, line 4: mend or remove them" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([chat("what?", "one")], "no conversation is left to train on"),
        ([chat("a question")] * 3, "no conversation is left to train on, with 3 skipped"),
        ([chat("long " * 80, "yes")] * 3, "within ctx_len 64"),
        ([chat("what?", "")] * 0, "no conversation is left"),
    ],
)
def test_nothing_left_is_said(tmp_path, rows, message):
    """Bug: a division by zero, or training on nothing."""
    with pytest.raises(ValueError, match=message):
        prepared(written(tmp_path / "chats.jsonl", *rows))


def test_sources_that_are_none(tmp_path):
    """Bug: text is taken for conversations, or the other way round, with a message that doesn't help."""
    from thinker.data.sources import open_evaluation, open_sources

    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for value, message in (
        ("nowhere.jsonl", "stdlib-qa"),
        ("stdlib", "stdlib: is text, no conversations: drop --chat"),
        (str(tmp_path / "empty"), "no .jsonl file in this folder"),
        (str(tmp_path / "a.txt"), "with --chat give .jsonl files"),
    ):
        with pytest.raises(ValueError, match=message):
            open_chats([value])
    for opened in (open_sources, lambda values: open_evaluation(*values)):
        with pytest.raises(ValueError, match="stdlib-qa: holds conversations, no text: name it with --data, and add"):
            opened(["stdlib-qa"])
    path = written(tmp_path / "chats.jsonl", chat("what?", "one"))
    with pytest.raises(ValueError, match="line 1: holds a conversation, no text: name it with --data, and add --chat"):
        list(open_sources([str(path)]).documents("train"))


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_pipe_is_no_empty_file_of_conversations(tmp_path):
    """Bug: `--chat --data <(zcat chats.jsonl.gz)` finds nothing at its second reading, or waits for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="no regular file, and conversations are read more than once: save them"):
        open_chats([str(tmp_path / "pipe.jsonl")])


def test_places_are_listed_shortly():
    """Bug: a hundred thousand line numbers on the screen, or none."""
    assert listed(["a, line 1", "a, line 3", "b, line 2"]) == "a, line 1; line 3; b, line 2"
    assert listed([f"a, line {n}" for n in range(1, 14)]).endswith("line 10 and 3 more")


# The split, and tokens on disk


def test_a_question_asked_twice_has_one_side(tmp_path):
    """Bug: the held-out loss is measured on questions that were trained with another answer."""
    rows = [chat(f"what is {n}?", answer) for n in range(200) for answer in ("one", "another")]
    sides: dict[str, set[str]] = {}
    for item in open_chats([str(written(tmp_path / "chats.jsonl", *rows))]).sides():
        assert not isinstance(item, Skipped)
        sides.setdefault(item[1].messages[0]["content"], set()).add(item[0])
    assert all(len(side) == 1 for side in sides.values())
    assert {"train", "valid"} == set().union(*sides.values())


def test_a_few_conversations_hold_out_the_last(tmp_path):
    """Bug: a stable hash holds nothing out of five conversations, or all."""
    items = list(open_chats([str(written(tmp_path / "chats.jsonl", *numbers(5)))]).sides())
    assert [item[0] for item in items if not isinstance(item, Skipped)].count("valid") == 1


def test_tokens_are_reused_until_something_changes(tmp_path, monkeypatch):
    """Bug: every start tokenises anew; or a changed file, template or tokenizer goes unnoticed; or damage does."""
    path = written(tmp_path / "chats.jsonl", *numbers(9))
    first = prepared(path)
    with monkeypatch.context() as patch:
        patch.setattr(ChatFormat, "encode_for_training", lambda *_: pytest.fail("tokenised again"))
        assert prepared(path).fingerprint == first.fingerprint
    (first.folder / "train.said").write_bytes(b"")
    assert prepared(path).fingerprint == first.fingerprint
    other = DEFAULT_TEMPLATE.replace("message.content +", "message.content | trim +")
    made = prepare_chats([str(path)], TOKENIZER, lambda tokenizer: ChatFormat(tokenizer, other), 64)
    assert made.folder != first.folder
    written(path, *numbers(10))
    assert prepared(path).fingerprint != first.fingerprint


def test_a_files_name_that_is_no_text(tmp_path):
    """Bug: a byte in a name that is no UTF-8 ends the preparation as an error of its own, or another file is named."""
    path = tmp_path / "caf\udce9.jsonl"
    try:
        written(path, *numbers(9))
    except OSError:
        pytest.skip("this file system has no such names")
    corpus = prepared(path)
    assert corpus.held_out(64)
    assert all(where.startswith(f"{path}, line ") for where in corpus.held_out(64))


# stdlib-qa


def test_the_first_sentence_of_a_docstring():
    """Bug: answers that are signatures, half a sentence, or a whole page."""
    assert first_sentence("Return a list.  More of it.\n\nAnd more.") == "Return a list."
    assert (
        first_sentence("Return a list\nof e.g. three, see RFC 1.2 there")
        == "Return a list of e.g. three, see RFC 1.2 there."
    )
    assert first_sentence("copy(x) -> y, a copy of it") is None
    assert first_sentence("") is None
    assert first_sentence("Two words") is None
    assert first_sentence("A " + "very " * 50 + "long sentence.") is None


def test_the_questions_of_the_standard_library():
    """Bug: a module is imported to be read (some print or open windows), a question has two answers."""
    script = (
        "import json, sys; from thinker.data.chats import open_chats; before = set(sys.modules)\n"
        "rows = [(side, [m['content'] for m in one.messages]) for side, one in open_chats(['stdlib-qa']).sides()]\n"
        "print(json.dumps([rows, sorted(set(sys.modules) - before)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows, imported = json.loads(done.stdout)
    assert not [name for name in imported if not name.startswith(("_sysconfigdata", "encodings", "sysconfig"))]
    answers = {question: answer for _, (question, answer) in rows}
    assert len(answers) == len(rows) > 1000
    wanted = "Recursively copy a directory tree and return the destination directory."
    assert answers["What does shutil.copytree do?"] == wanted
    share = [side for side, _ in rows].count("valid") / len(rows)
    assert 0.01 < share < 0.15


# Runs


def settings(data: Path | str, out: Path, **changes) -> TrainConfig:
    values = {"data": (str(data),), "out": out, "chat": True, "steps": 6, "batch_size": 2, "seed": 3}
    return TrainConfig.model_validate(values | {"precision": "float32", "compile": "off"} | changes)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "checkpoint_activations": True}])
def test_a_run_on_chats_resumes_bit_for_bit(tmp_path, changes):
    """Bug: rows are packed or shuffled otherwise after a restart, or the template of the run is lost."""
    path = written(tmp_path / "chats.jsonl", *numbers(60))
    with repeatable(None):
        whole = begin(ARCHITECTURE, settings(path, tmp_path / "whole", **changes), set(), quiet)
        watched = Silent()
        fit(whole, watched)
        stopped = Silent()
        stopped.after_step = lambda run, report: run.step == 3 and os.kill(os.getpid(), signal.SIGINT)
        assert fit(begin(ARCHITECTURE, settings(path, tmp_path / "parts", **changes), set(), quiet), stopped)
        goes_on = resume(ARCHITECTURE, settings(path, tmp_path / "parts"), {"out"}, quiet)
        rest = Silent()
        fit(goes_on, rest)
    assert_same(weights(whole), weights(goes_on))
    assert rest.losses == watched.losses[3:]
    with pytest.raises(ValueError, match="chat is True in this run"):
        resume(ARCHITECTURE, settings(path, tmp_path / "parts", chat=False), {"out", "chat"}, quiet)


def test_a_model_that_learned_chats_replies_and_stops(tmp_path):
    """Bug: recall is asked with other tokens than were trained; the published model doesn't stop at the turn's end."""
    path = written(tmp_path / "chats.jsonl", *[chat(f"what is {n}?", f"it is {n}{n}") for n in range(8)])
    shown = Console(file=io.StringIO(), width=100, highlight=False)
    with repeatable(None):
        # By heart, which the recipe guards against with decay and by publishing the state that generalises best.
        by_heart = {"weight_decay": 0.0, "early_stop": 0}
        options = settings(path, tmp_path / "run", steps=150, lr=1e-2, batch_size=3, validate_every=1.0, **by_heart)
        run = begin(ARCHITECTURE.changed(dropout=0.0), options, set(), quiet)
        with Reporter(run, shown) as reporter:
            fit(run, reporter)
        report = summarise_chats(run, reporter.rows, shown, 1.0)
    assert report["exact_recall"] == 1.0
    assert report["asked"] == report["recalled"] == len(run.corpus.train) == 7
    assert report["held_out_loss"] == pytest.approx(held_out_loss(run), rel=1e-4)
    assert "exact recall" in shown.file.getvalue()
    assert "7 of 7" in shown.file.getvalue()
    end = run.tokenizer.special_ids[END]
    assert open_model(tmp_path / "run").eos_ids == (run.tokenizer.eos_id, end)
    llm = load(tmp_path / "run", backend="torch")
    assert llm.chat(chat("what is 3?")["messages"]) == "it is 33"
    asked = exchanges(run.corpus.train, 64, 3)
    assert replies(run, asked) == [run.tokenizer.decode(one.reply) for one in asked]
    assert asked[0].before[-1] == run.tokenizer.special_ids["<|assistant|>"]


def test_a_run_that_went_astray_is_told_of_all_the_same(tmp_path, monkeypatch):
    """Bug: a loss whose perplexity no float holds ends the run in a traceback, without any report."""
    path = written(tmp_path / "chats.jsonl", *numbers(9))
    monkeypatch.setattr(chat_summary, "reply_loss", lambda *_: (800.0, 9))
    shown = Console(file=io.StringIO(), width=100, highlight=False)
    with repeatable(None):
        run = begin(ARCHITECTURE, settings(path, tmp_path / "run", steps=1), set(), quiet)
        run.folder.mkdir(exist_ok=True)
        assert summarise_chats(run, [{"step": 1, "loss": 800.0}], shown, 1.0)["held_out_loss"] == 800
    assert "perplexity inf" in shown.file.getvalue()


def test_a_model_with_a_template_of_its_own_keeps_it(tmp_path):
    """Bug: fine-tuning replaces the template that a model was made with, or its end of turn stays no end of text."""
    from test_llm import folder_of

    template = DEFAULT_TEMPLATE.replace("message.content +", "'> ' + message.content +")
    first = folder_of(tmp_path / "first", ctx_len=64)
    values = json.loads((first / "tokenizer_config.json").read_text())
    values["chat_template"] = template
    (first / "tokenizer_config.json").write_text(json.dumps(values))
    path = written(tmp_path / "chats.jsonl", *numbers(9))
    with repeatable(None):
        run = begin(ARCHITECTURE, settings(path, tmp_path / "run", init=str(first), steps=1), set(), quiet)
        fit(run, Silent())
    files = open_model(tmp_path / "run")
    assert files.chat_template == template
    assert files.eos_ids == (2, run.tokenizer.special_ids[END])
    assert "> it is" in run.tokenizer.decode(run.corpus.train[0][0])


def test_a_model_without_tokens_for_turns_gets_them():
    """Bug: a plain model from elsewhere can't be taught chats, or its old rows change when new ones are appended."""
    values = json.loads(TOKENIZER.to_json())
    values["added_tokens"] = []
    names = {token for token in values["model"]["vocab"] if token.startswith("<|")}
    kept = [token for token in values["model"]["vocab"] if token not in names]
    values["model"]["vocab"] = {token: id for id, token in enumerate(kept)}
    plain = Tokenizer.from_json(json.dumps(values))
    assert not plain.control_ids
    config = small("tied", vocab_size=plain.vocab_size)
    parameters = {k: v.detach().numpy() for k, v in randomise(ThinkerLM(config)).named_parameters()}
    grown_config, grown, tokenizer, publication = with_turns(config, parameters, plain, Publication())
    assert publication.chat_template == DEFAULT_TEMPLATE
    assert grown_config.vocab_size == tokenizer.vocab_size > plain.vocab_size
    old = parameters["tok_emb.weight"]
    assert np.array_equal(grown["tok_emb.weight"][: len(old)], old)
    assert np.allclose(grown["tok_emb.weight"][len(old) :], old.mean(axis=0))
    assert len(grown["tok_emb.weight"]) == tokenizer.vocab_size
    assert tokenizer.encode("What is it?") == plain.encode("What is it?")
    assert ChatFormat(tokenizer).end_id == tokenizer.special_ids[END]


def test_messages_hold_whole_paths_when_they_leave_their_file(tmp_path):
    """Bug: a picture is looked for where the command was started, or a text or a data URI becomes a path."""
    parts = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "?"}, {"type": "image", "image": "data:,x"}]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "yes"})
    conversation = Conversation("f.jsonl, line 1", messages, tmp_path)
    picture = {"type": "image", "image": str(tmp_path / "a.png")}
    assert conversation.with_whole_paths == ({"role": "user", "content": [picture, *parts[1:]]}, messages[1])
