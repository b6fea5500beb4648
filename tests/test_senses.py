"""Training with pictures and sounds, and using what it gives: exact, repeatable, and no picture taken for another."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import randomise
from PIL import Image
from rich.console import Console

from thinker import ThinkerConfig, ThinkerLM, Tokenizer, load
from thinker.answers import answers, conversations_of, share
from thinker.chat import DEFAULT_TEMPLATE
from thinker.checkpoint import training
from thinker.checkpoint.publish import Publication, write_view
from thinker.commands import encode, eval, export, generate, parse
from thinker.commands.conversation import Conversation
from thinker.data.chats import open_chats
from thinker.data.digits import DIGIT_SETS, SPEAKERS, answer_to, facts, pictures
from thinker.formats import Modality
from thinker.llm import LLM
from thinker.loss import NextTokenLoss
from thinker.modality.senses import Senses
from thinker.modality.settings import SensesConfig
from thinker.train import loop
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable
from thinker.train.loop import fit
from thinker.train.run import Run
from thinker.train.senses import draws_for, occurrences
from thinker.train.senses_summary import summarise_senses
from thinker.train.start import begin, resume

CONFIG = ThinkerConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=2, d_ff=48, ctx_len=96, dropout=0.1)
SENSES = {
    "image": {"kind": "patches", "width": 16, "size": 16, "patch": 8, "heads": 2, "layers": 1},
    "audio": {"kind": "log-mel", "width": 16, "mels": 12, "heads": 2, "layers": 1},
}


class Silent:
    """A watcher that says nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def part(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, kind: name}


def row(content: object, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures, sounds of unequal length, both at once, and text alone; and a file of settings for small encoders."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (10, 14), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * rng.normal(size=800 + 150 * i), 8000)
        text = {"type": "text", "text": "what?"}
        lines += [
            row([part("image", f"{i}.png"), text], f"p{i}"),
            row([text, part("audio", f"{i}.wav"), part("image", f"{i}.png")], f"b{i}"),
            row("only text", f"t{i}"),
        ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "senses.json").write_text(json.dumps(SENSES), encoding="utf-8")
    return tmp_path / "chats.jsonl"


def settings(data: Path, out: Path, **changes) -> TrainConfig:
    values = {"data": (str(data),), "out": out, "chat": True, "steps": 4, "batch_size": 2, "precision": "float32"}
    return TrainConfig.model_validate(values | {"compile": "off", "senses": data.parent / "senses.json"} | changes)


def train(data: Path, out: Path, **changes) -> Run:
    with repeatable(None):
        run = begin(CONFIG, settings(data, out, **changes), set(), lambda line: None)
        fit(run, Silent())
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.trained.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published model with senses whose parameters are all random."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["what is this", "and that"], 320)
    config = CONFIG.changed(vocab_size=tokenizer.vocab_size)
    senses = SensesConfig.model_validate(SENSES)
    arrays = [
        {name: p.detach().numpy() for name, p in randomise(made).named_parameters()}
        for made in (ThinkerLM(config), Senses(senses, config.d_model))
    ]
    about = Publication(
        bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id, chat_template=DEFAULT_TEMPLATE
    )
    write_view(tmp_path / "model", 1, config, arrays[0], about, tokenizer.to_json(), Modality(senses, arrays[1]))
    return tmp_path / "model"


# Batches and training


def test_media_are_found_where_they_stand():
    """Catches two media that are taken for one, and one of several places that is taken for several."""
    media = np.array([[0, 2, 2, 0, 2, 0], [3, 3, 0, 1, 0, 0]])
    assert occurrences(media > 0, media).tolist() == [[0, 1, 2], [0, 4, 2], [1, 0, 3], [1, 3, 1]]
    assert occurrences(media == 1, media).tolist() == [[1, 3, 1]]


def test_changes_are_drawn_from_seed_row_and_place():
    """Catches changes that repeat from batch to batch, or depend on what was drawn before."""
    rows, places = np.array([7, 7, 8]), np.array([1, 2, 1])
    drawn = draws_for(5, rows, places)
    assert len(np.unique(drawn)) == drawn.size
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_array_equal(draws_for(5, rows[2:], places[2:]), drawn[2:])
    assert (draws_for(6, rows, places) != drawn).all()


def test_rows_carry_their_media(data, tmp_path):
    """Catches features spliced beside their placeholders, and a loss on them."""
    run = begin(CONFIG, settings(data, tmp_path / "run"), set(), lambda line: None)
    inputs, targets, segments, media, numbers = run.batches.batch(3)
    again = run.batches.batch(3)
    assert all((one == other).all() for one, other in zip(run.batches.batch(3), again, strict=True))
    placeholders = [run.tokenizer.special_ids[name] for name in ("<|image|>", "<|audio|>")]
    assert (np.isin(inputs, placeholders) == (media > 0)).all()
    assert not np.isin(targets, placeholders).any()
    assert (segments[media > 0] > 0).all()
    assert numbers.tolist() == [6, 7]
    embedded = run.module.embed(*(torch.from_numpy(a) for a in (inputs, media, numbers)))
    text = torch.from_numpy(media == 0)
    assert torch.equal(embedded[text], run.model.tok_emb(torch.from_numpy(inputs))[text])


def test_micro_batches_come_to_the_whole_step(data, tmp_path):
    """Catches media that go astray when a step is taken in parts, and changes that depend on the split."""
    gradients = []
    for accumulate, rows in ((1, 4), (4, 1)):
        wanted = settings(data, tmp_path / "run", batch_size=rows, accumulate=accumulate)
        run = begin(CONFIG.changed(dropout=0.0), wanted, set(), lambda line: None)
        for block in run.senses.modules():
            if isinstance(block, torch.nn.Dropout):
                block.p = 0.0
        randomise(run.trained, seed=3)
        batch = run.batches.batch(0)
        loop.gradients(run, run.module, batch, int((batch[1] != -100).sum()))
        gradients.append({name: p.grad.clone() for name, p in run.trained.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)
        assert gradient.abs().max() > 0, name


def test_a_run_repeats_and_resumes_bit_for_bit(data, tmp_path):
    """Catches encoders, projectors or their optimiser left out of the exact state, and draws that depend on history."""
    whole = train(data, tmp_path / "a", steps=6)
    again = weights(train(data, tmp_path / "b", steps=6))
    assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())
    with repeatable(None):
        run = begin(CONFIG, settings(data, tmp_path / "c", steps=6), set(), lambda line: None)
        for _ in range(3):
            loop.take_step(run, run.module, loop.rate(run.progress(), schedule="linear", warmup=0.02))
            run.step += 1
        run.save()
        (tmp_path / "senses.json").unlink()  # the state must not need it
        run = resume(CONFIG, settings(data, tmp_path / "c", steps=6), set(), lambda line: None)
        fit(run, Silent())
    for name, value in weights(whole).items():
        assert torch.equal(weights(run)[name], value), name


def test_another_picture_under_the_same_name_is_another_corpus(data, tmp_path):
    """Catches a run that goes on with other pictures than it began with."""
    train(data, tmp_path / "a")
    Image.new("L", (9, 9), 3).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="has changed since"):
        resume(CONFIG, settings(data, tmp_path / "a", steps=8), {"steps"}, lambda line: None)


def test_one_bad_file_is_counted_unless_asked(data, tmp_path):
    """Catches a damaged picture that ends a run of thousands, or that nobody is told of."""
    (tmp_path / "3.png").write_text("no picture")
    said: list[str] = []
    run = begin(CONFIG, settings(data, tmp_path / "run"), set(), said.append)
    told = next(line for line in said if "picture or sound that can't be used" in line)
    assert "skipped 2 conversations" in told
    assert "3.png: is no picture" in told
    assert len(run.corpus.train) + len(run.corpus.valid) == 70
    with pytest.raises(ValueError, match=r"chats.jsonl, line 10: 3.png: is no picture"):
        begin(CONFIG, settings(data, tmp_path / "other", strict_media=True), set(), lambda line: None)


@pytest.mark.parametrize("package", ["soundfile", "PIL"])
def test_a_missing_package_is_the_fault_of_no_file(folder, data, tmp_path, monkeypatch, package):
    """Catches every sound skipped for want of a package, and still skipped, from the cache, once it is installed."""
    with monkeypatch.context() as without:
        without.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=r"^(sounds|pictures) need \w+: pip install 'thinker\[senses\]'$"):
            begin(CONFIG, settings(data, tmp_path / "run"), set(), lambda line: None)
        arguments = [str(data), "--using", str(folder), "--out", str(tmp_path / "out")]
        with pytest.raises(ValueError, match="pip install"):
            encode.run(parse(encode.Options, "encode", arguments))
    assert not list((tmp_path / "cache" / "chats").iterdir())
    corpus = begin(CONFIG, settings(data, tmp_path / "run"), set(), lambda line: None).corpus
    assert len(corpus.train) + len(corpus.valid) == 72


def test_a_frozen_thinker_stays(data, tmp_path):
    """Catches a language half that moves although it is frozen, or senses that don't."""
    first = train(data, tmp_path / "a")
    (tmp_path / "senses.json").write_text(json.dumps(SENSES | {"freeze_thinker": True}), encoding="utf-8")
    second = train(data, tmp_path / "b", init=str(tmp_path / "a"))
    before, after = weights(first), weights(second)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith(("image.", "audio.")), name


def test_text_rows_stand_among_conversations(data, tmp_path):
    """Catches text that is not trained on, and media shifted into another row by it."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200, encoding="utf-8")
    changes = {"text": (str(text),), "batch_size": 4, "text_share": 0.5}
    run = begin(CONFIG, settings(data, tmp_path / "run", **changes), set(), lambda line: None)
    plain = begin(CONFIG, settings(data, tmp_path / "other"), set(), lambda line: None)
    inputs, targets, segments, media, numbers = run.batches.batch(5)
    assert [(row > 0).any() for row in media] == [True, False, True, False]
    for mixed, alone in zip((inputs, targets, segments, media, numbers), plain.batches.batch(5), strict=True):
        np.testing.assert_array_equal(mixed[[0, 2]], alone)
    assert (inputs[1, 1:] == targets[1, :-1]).all()
    assert (segments[1] == 1).all()
    first = weights(train(data, tmp_path / "a", **changes))
    assert all(
        torch.equal(value, first[name]) for name, value in weights(train(data, tmp_path / "b", **changes)).items()
    )
    text.write_text("another text\n" * 800, encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since"):
        resume(CONFIG, settings(data, tmp_path / "a", steps=9, **changes), {"steps"}, lambda line: None)


# The checkpoint, and using it


def test_the_language_half_is_a_plain_model(data, tmp_path):
    """Catches senses that change names, logits or the opening of the folder elsewhere."""
    from transformers import AutoModelForCausalLM

    run = train(data, tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokens = torch.arange(40, 60)[None]
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, run.model(tokens), rtol=0, atol=1e-4)
    state = training.load(training.latest(tmp_path / "run"))
    assert set(state.parameters) == {name for name, _ in run.model.named_parameters()}
    assert set(state.modality) == {name for name, _ in run.senses.named_parameters()}
    published = load(tmp_path / "run").files.modality
    for name, value in state.modality.items():
        np.testing.assert_array_equal(published.tensors[name], value)


def test_a_view_without_its_encoders_is_mended_or_refused(data, tmp_path):
    """Catches a copied folder that lost its encoders and answers about pictures it can't see."""
    train(data, tmp_path / "run")
    (tmp_path / "run" / "modality.safetensors").unlink()
    assert load(tmp_path / "run").files.modality is not None
    (tmp_path / "run" / "modality.safetensors").unlink()
    (tmp_path / "run" / "training").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"modality.safetensors is missing"):
        load(tmp_path / "run")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_attached_decides_the_text(folder, data, backend):
    """Catches attachments in another order, a reply that ignores them, and prefill in parts that differs from whole."""
    llm = load(folder, backend=backend)
    files = [data.parent / name for name in ("1.png", "2.wav", "3.png")]
    texts = {
        order: llm.generate("what?", attach=[files[i] for i in order], max_new_tokens=12, ignore_eos=True)
        for order in ((0, 1), (1, 0), (0, 2), (2, 0), (0,))
    }
    assert len(set(texts.values())) == len(texts)
    message = [{"role": "user", "content": [part("image", str(files[0])), part("audio", str(files[1])), "x"]}]
    message[0]["content"][2] = {"type": "text", "text": "what?"}
    assert llm.chat(message, max_new_tokens=12, ignore_eos=True) == texts[0, 1]
    embeddings, _ = llm.reader.prompt(message)
    logits = llm.model(embeddings=torch.from_numpy(embeddings)[None].to(llm.model.head.weight)).detach()[0]
    slot = llm.decoder
    slot.truncate(0, 0)
    slot.prefill(0, embeddings=embeddings[:7])
    np.testing.assert_allclose(slot.prefill(0, embeddings=embeddings[7:]), logits[-1], rtol=0, atol=1e-4)


def test_both_decoders_say_the_same(folder, data):
    """Catches native prefill from embeddings that drifts from the model's own."""
    asked = {"attach": [data.parent / "4.wav", data.parent / "5.png"], "max_new_tokens": 10, "ignore_eos": True}
    assert load(folder, backend="native").generate("?", **asked) == load(folder, backend="torch").generate("?", **asked)


def test_one_picture_is_never_taken_for_another(folder, data):
    """Catches keys and values of the last picture reused for the next: their ids are the same placeholders."""
    llm = load(folder)
    fresh = load(folder)
    for name in ("6.png", "7.png", "6.png"):
        message = [{"role": "user", "content": [part("image", str(data.parent / name)), part("image", "x")]}]
        message[0]["content"][1] = {"type": "text", "text": "and what is that?"}
        expected = fresh.generations(
            ["and what is that?"], attach=[data.parent / name], max_new_tokens=8, ignore_eos=True
        )[0]
        assert llm.chat(message, max_new_tokens=8, ignore_eos=True) == expected.text
    again = llm._reply_to(message, max_new_tokens=8)
    result = [piece.result for piece in llm.engine.run([again], reuse=True)][-1]
    assert result.reused_tokens == again.length - 1  # the same picture again costs nothing


def test_placeholders_in_a_prompt_say_where(folder, data):
    """Catches attachments that end up elsewhere than the prompt says, and counts that are off by one."""
    llm = load(folder)
    files = [data.parent / "1.png", data.parent / "2.wav"]
    in_front = llm.generate("what?", attach=files, max_new_tokens=8, ignore_eos=True)
    assert llm.generate("<|image|><|audio|>what?", attach=files, max_new_tokens=8, ignore_eos=True) == in_front
    with pytest.raises(ValueError, match="1 attachments of image for 2 placeholders"):
        llm.generate("<|image|> or <|image|>?", attach=files[:1])
    with pytest.raises(ValueError, match="1 attachments of audio for 0 placeholders"):
        llm.generate("<|image|>?", attach=files)


def test_a_conversation_keeps_what_was_attached(folder, data, tmp_path):
    """Catches a picture that the second question no longer sees, or that a saved conversation can't find."""
    llm = load(folder)
    talk = Conversation(llm, {"max_new_tokens": 6, "ignore_eos": True}, lambda line: None)
    with pytest.raises(ValueError, match=r"no.png"):
        talk.attach(tmp_path / "no.png")
    talk.attach(data.parent / "1.png")
    first = "".join(talk.ask("what?"))
    second = "".join(talk.ask("and that?"))
    picture = part("image", str(data.parent / "1.png"))
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and that?"},
    ]
    assert load(folder).chat(messages, max_new_tokens=6, ignore_eos=True) == second
    talk.save(tmp_path / "elsewhere.jsonl")
    saved = conversations_of(str(tmp_path / "elsewhere.jsonl"))[0]
    assert saved.messages[0] == messages[0]
    assert saved.media[0].path == data.parent / "1.png"


def test_a_conversation_goes_on_when_its_file_is_gone(folder, data, tmp_path):
    """Bug: every later message is refused since the first one's picture was moved away."""
    llm, ours, copy = load(folder), data.parent / "1.png", tmp_path / "copy.png"
    shutil.copy(ours, copy)
    asked, still_asked = ([{"role": "user", "content": [part("image", str(path))]}] for path in (copy, ours))
    said = llm.chat(asked, max_new_tokens=6)
    copy.unlink()
    assert llm.chat(asked, max_new_tokens=6) == llm.chat(still_asked, max_new_tokens=6) == said
    with pytest.raises(ValueError, match=r"copy\.png: No such file"):
        load(folder).chat(asked)


def test_the_command_takes_attachments_in_order(folder, data, capsys):
    """Catches a flag that keeps only its last file, or sorts them."""
    files = [str(data.parent / name) for name in ("2.wav", "1.png")]
    flags = [flag for file in files for flag in ("--attach", file)]
    options = parse(generate.Options, "generate", [str(folder), "what?", *flags, "--max-new-tokens", "9"])
    generate.run(options)
    assert capsys.readouterr().out == load(folder).generate("what?", attach=files, max_new_tokens=9)


def test_models_without_senses_and_files_without_sense_are_refused(folder, data, tmp_path):
    """Catches a picture that is dropped in silence, or an export that loses the encoders without a word."""
    llm = load(folder)
    with pytest.raises(ValueError, match=r"nowhere.png"):
        llm.generate("?", attach=["nowhere.png"])
    with pytest.raises(ValueError, match="give a list of files"):
        llm.generate("?", attach="7.png")
    for odd in (None, b"7.png", Image.new("L", (4, 4))):
        with pytest.raises(ValueError, match="give a list of files"):
            llm.generate("?", attach=[data.parent / "1.png", odd])
    for name in ("modality.safetensors", "modality.json"):
        (folder / name).rename(tmp_path / name)
    own = json.loads((folder / "thinker.json").read_text())
    (folder / "thinker.json").write_text(json.dumps(own | {"senses": []}))
    with pytest.raises(ValueError, match="has no encoders"):
        load(folder).generate("?", attach=[data.parent / "1.png"])


def test_export_says_what_it_can_not_carry(folder, tmp_path):
    """Catches a GGUF file of a model with senses that is made without a word about them."""
    out = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="encoders and projectors for image and audio"):
        export.run(parse(export.Options, "export", [str(folder), str(out)]))
    assert not out.exists()
    assert export.run(parse(export.Options, "export", [str(folder), str(out), "--text-only", "--no-check"])) == 0
    assert out.exists()


# Answers, and features from elsewhere


def test_exact_answers_are_counted(folder, data, tmp_path, capsys):
    """Catches an answer that counts although it is wrong, or is asked with another conversation's picture."""
    llm: LLM = load(folder)
    found = conversations_of(str(data))[:6]
    given = answers(llm, found, max_new_tokens=6)
    lines = []
    for number, answer in enumerate(given):
        said = answer.said if number % 2 else answer.said + "!"
        lines.append({"messages": [*answer.asked, {"role": "assistant", "content": said or " "}]})
    path = tmp_path / "again.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert share(answers(llm, conversations_of(str(path)), max_new_tokens=6)) == 0.5
    eval.run(parse(eval.Options, "eval", [str(folder), "--chat", "--data", str(path), "--json"]))
    assert json.loads(capsys.readouterr().out)["exact_match"][str(path)]["asked"] == 6


def test_what_can_not_be_asked_is_named_and_the_rest_is_asked(folder, data, tmp_path, capsys):
    """Bug: the answers of an hour are lost for one conversation that is too long, and nobody says which."""
    rows = [row("only text", "t"), row("long " * 99, "t"), row([part("image", "gone.png")], "g"), row("more text", "t")]
    rows.append({"messages": [{"role": "user", "content": "nobody replies"}]})
    path, long = tmp_path / "some.jsonl", tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    long.write_text(json.dumps(rows[1]), encoding="utf-8")
    command = [str(folder), "--chat", "--json", "--backend", "torch", "--data"]
    assert eval.run(parse(eval.Options, "eval", [*command, str(path), str(long)])) == 0
    said = capsys.readouterr()
    assert {name: one["asked"] for name, one in json.loads(said.out)["exact_match"].items()} == {str(path): 2}
    assert f"skipped 2 conversations longer than ctx_len 96: {path}, line 2; {long}, line 1\n" in said.err
    assert f"skipped 1 conversation that can't be asked: {path}, line 3: {tmp_path}/gone.png: No such" in said.err
    assert f"skipped 1 conversation without an assistant turn: {path}, line 5\n" in said.err
    with pytest.raises(ValueError, match=r"long\.jsonl: no conversation is left to be asked: .* larger --ctx-len"):
        eval.run(parse(eval.Options, "eval", [*command, str(long)]))


def test_a_run_ends_with_what_its_corpus_held_out(data, tmp_path, monkeypatch):
    """Catches a run that fails at its end over text, dollar signs, or what was skipped; and figures of trained rows."""
    (tmp_path / "senses.json").write_text(json.dumps({"image": SENSES["image"]}), encoding="utf-8")

    def pictures_of(words: str) -> list[dict[str, object]]:
        return [row([part("image", f"{i}.png"), {"type": "text", "text": words}], "yes") for i in range(24)]

    rows = {
        "good": pictures_of("Is $x_$?"),
        "few": pictures_of("which?")[:12],
        "mixed": [
            *(one for i, name in enumerate(["missing.png", "http://x/y.png"] * 12) for one in (
                row([part("image", name), {"type": "text", "text": f"{i}?"}], "none"),
                row([part("image", f"{i}.png"), {"type": "text", "text": "long " * 90}], "too long"),
                row([part("audio", f"{i}.wav"), {"type": "text", "text": "what?"}], "unheard"),
                row(f"text {i}", "text"),
            )),
            *pictures_of("how many $_$?"),
        ],
    }  # fmt: skip
    names = [str(tmp_path / f"{name}.jsonl") for name in rows]
    for name, some in zip(names, rows.values(), strict=True):
        Path(name).write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    wanted = settings(data, tmp_path / "run", steps=1).model_copy(update={"data": tuple(names)})
    with repeatable(None):
        fit(run := begin(CONFIG, wanted, set(), lambda line: None), Silent())
    seen: list[str] = []

    def asked(llm, some, _):
        seen.extend(one.where for one in some)
        return answers(llm, some, 4)

    monkeypatch.setattr("thinker.train.senses_summary.answers", asked)
    report = summarise_senses(run.folder, names, run.corpus, Console(file=io.StringIO()))
    pictures = {
        f"{name}, line {number}"
        for name, some in zip(names, rows.values(), strict=True)
        for number, one in enumerate(some, start=1)
        if one["messages"][1]["content"] == "yes"
    }
    held_out = {item[1].where for item in open_chats(names).sides() if item[0] == "valid"}
    alone = {item[1].where for name in names for item in open_chats([name]).sides() if item[0] == "valid"}
    assert alone - held_out  # else there is nothing to be taken for held out
    assert sorted(seen) == sorted(held_out & pictures)
    assert sum(one["asked"] for one in report.values()) == len(seen)
    assert (run.folder / "answers.png").stat().st_size > 10_000
    (tmp_path / seen[0].split(", ")[0]).unlink()
    out = io.StringIO()
    summarise_senses(run.folder, names, run.corpus, Console(file=out, width=500))
    assert "not asked: " in out.getvalue()


def test_results_in_a_file_stand_line_by_line(folder, data, tmp_path, monkeypatch):
    """Catches a bar that leaves an empty line between two results where nobody sees bars."""
    corpus = begin(CONFIG, settings(data, tmp_path / "run"), set(), lambda line: None).corpus
    monkeypatch.setattr("thinker.train.senses_summary.answers", lambda llm, some, _: answers(llm, some[:2], 2))
    out = io.StringIO()
    summarise_senses(folder, [str(data), str(data)], corpus, Console(file=out, width=500))
    heading, *results = out.getvalue().strip().splitlines()[:3]
    assert heading.endswith("exact answers:")
    assert all("% of " in line for line in results)


def test_features_computed_once_train_as_well(folder, data, tmp_path, capsys, monkeypatch):
    """Catches features that lose their order or their width on the way, and a callable's mistakes without the file."""
    out = tmp_path / "features"
    arguments = [str(data), "--using", str(folder), "--out", str(out)]
    assert encode.run(parse(encode.Options, "encode", arguments)) == 0
    assert len(list(out.glob("*.npy"))) == 48
    llm = load(folder)
    own = llm.reader.senses.of("image")
    first = json.loads((out / "data.jsonl").read_text().splitlines()[0])["messages"][0]["content"][0]["image"]
    from thinker.modality.media import Medium

    prepared = Medium("image", "0.png", data.parent / "0.png").prepared(llm.reader.senses.config)
    with torch.no_grad():
        np.testing.assert_array_equal(np.load(out / first), own.encode([prepared]).numpy())
    run = train(out / "data.jsonl", tmp_path / "run", senses=None)
    assert run.senses.config.image.kind == run.senses.config.audio.kind == "features"
    assert run.senses.config.image.width == 16
    examples = []
    monkeypatch.setattr("thinker.train.senses_summary.answered", lambda path, some: examples.extend(some))
    summarise_senses(run.folder, [str(out / "data.jsonl")], run.corpus, Console(file=io.StringIO()))
    shown = [one for example in examples for one in example.media]
    assert {one.kind for one in shown} == {"image", "audio"}
    assert all(one.values is None and one.attention.ndim == 1 for one in shown)
    (tmp_path / "mine.py").write_text("import numpy\ndef width5(path):\n    return numpy.ones((2, 5))\n")
    using = ["--using", f"{tmp_path / 'mine.py'}:width5", "--kind", "image"]
    encode.run(parse(encode.Options, "encode", [str(data), *using, "--out", str(tmp_path / "mine")]))
    lines = (tmp_path / "mine/data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert np.load(tmp_path / "mine" / rows[0][0]["image"]).shape == (2, 5)
    assert rows[1][1]["audio"].endswith(".wav")
    capsys.readouterr()


def test_encode_can_be_corrected_and_asked_again(data, tmp_path):
    """Catches half a data.jsonl that the corrected command takes for a finished one, and tracebacks for mistakes."""
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nimport numpy\n"
        "@dataclasses.dataclass\nclass Size:\n    width: int = 5\n"
        "def features(path):\n    return numpy.ones((2, Size().width))\n"
    )
    (tmp_path / "7.png").rename(tmp_path / "away.png")

    def encoded(using: str, out: str = "out") -> None:
        arguments = [str(data), "--using", using, "--out", str(tmp_path / out), "--strict-media"]
        assert encode.run(parse(encode.Options, "encode", arguments)) == 0

    right = f"{tmp_path / 'mine.py'}:features"
    for using, out, message in (
        (".mine:features", "out", r"\.mine: is relative"),
        (right, "1.png", r"1\.png: File exists: choose another folder"),
        (right, "out", r"line 22: .*7\.png"),
    ):
        with pytest.raises(ValueError, match=message):
            encoded(using, out)
    (tmp_path / "away.png").rename(tmp_path / "7.png")
    encoded(right)
    assert len((tmp_path / "out" / "data.jsonl").read_text().splitlines()) == 72
    with pytest.raises(ValueError, match=r"data\.jsonl exists"):
        encoded(right)


# The named sets


def test_digits_hold_out_every_fifth_picture():
    """Catches a picture that is on both sides, or a label of another one."""
    found = pictures()
    assert len(found) == 1797
    assert sum(one.split == "valid" for one in found) == 359
    from sklearn.datasets import load_digits

    data = load_digits()
    for number in (0, 100, 1796):
        grey = np.asarray(Image.open(found[number].path), float)
        np.testing.assert_allclose((255 - grey) / 255 * 16, data.images[number], atol=0.07)
        assert found[number].digit == data.target[number]


@pytest.mark.skipif("THINKER_DATA" not in os.environ, reason="THINKER_DATA is not set")  # it would be downloaded
def test_spoken_digits_and_sums():
    """Catches a recording of the test split, or a speaker left out, among those to train on; and wrong sums."""
    from thinker.data.digits import recordings

    try:
        heard = recordings()
    except ValueError as error:
        pytest.skip(f"no recordings here: {error}")
    assert len(heard) == 3000
    held_out = [one for one in heard if one.split == "valid"]
    assert len(held_out) == 300
    assert {int(one.path.stem.split("_")[2]) for one in held_out} == set(range(5))
    for speaker in SPEAKERS:
        aside = {one.path.stem.split("_")[1] for one in recordings(speaker) if one.split == "valid"}
        assert aside == {speaker}
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    for item in open_chats(["digit-sums"]).sides():
        side, conversation = item
        if not conversation.media:
            assert side == "train"
            continue
        media, question = conversation.messages[0]["content"][:2], conversation.messages[0]["content"][2]["text"]
        shown = int(next(p["image"] for p in media if p["type"] == "image")[-5])
        spoken = int(Path(next(p["audio"] for p in media if p["type"] == "audio")).name[0])
        right = {
            "sum?": f"{shown}+{spoken}={shown + spoken}",
            "same?": f"{shown},{spoken}: " + ("yes" if shown == spoken else "no"),
            "larger?": f"{shown},{spoken}: "
            + ("neither" if shown == spoken else "the picture" if shown > spoken else "the sound"),
        }[question]
        assert conversation.messages[1]["content"] == right
        sides[side] |= {p[p["type"]] for p in media}
    assert not sides["train"] & sides["valid"]
    assert set(DIGIT_SETS) == {"digits", "fsdd", "digit-sums", *(f"fsdd:{speaker}" for speaker in SPEAKERS)}


def test_a_digit_is_the_same_token_wherever_it_stands():
    """Catches answers whose two digits are different tokens, by a space: that they are the same is hardly learned."""
    answers = [answer_to(question, shown, spoken) for shown, spoken, question in facts()]
    tokenizer = Tokenizer.train(answers * 4, 400)
    for answer in answers:
        tokens = [tokenizer.decode([token]) for token in tokenizer.encode(answer)]
        first, second = re.findall(r"\d+", answer)[:2]
        assert tokens[0] == first
        assert tokens[2] == second
    same = [answer for answer in answers if answer.endswith(("yes", "no"))]
    assert 0.3 < sum(answer.endswith("yes") for answer in same) / len(same) < 0.7


def test_only_what_is_asked_has_logits(data, tmp_path):
    """Catches a loss over another choice of places than the model's own, or hidden states paired with other targets."""
    run = begin(CONFIG, settings(data, tmp_path / "run"), set(), lambda line: None)
    randomise(run.model).eval()
    run.senses.eval()
    batch = [torch.from_numpy(part) for part in run.batches.batch(1)]
    tokens, targets, segments, media, numbers = batch
    with torch.no_grad():
        got = run.module(*batch)
        whole = NextTokenLoss(run.model)(None, targets, segments, embeddings=run.module.embed(tokens, media, numbers))
    assert got.tokens == whole.tokens
    torch.testing.assert_close(got.total, whole.total, rtol=1e-6, atol=0)
