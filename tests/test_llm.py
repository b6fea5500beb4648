from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise, small

from thinker import load
from thinker.chat import DEFAULT_TEMPLATE
from thinker.checkpoint.publish import Publication, write_view
from thinker.decode.native import NativeUnavailable
from thinker.decode.torch_decoder import TorchDecoder
from thinker.formats import open_model
from thinker.formats.gguf_export import export_gguf
from thinker.generate import Request
from thinker.llm import slot_bytes
from thinker.model import ThinkerLM
from thinker.tokenizer import END, Tokenizer

TOKENIZER = Tokenizer.train(["Once upon a time there was a small model that wrote a small story.\n"] * 9, 330)
PROMPTS = ["Once upon", "a small", "é😀", "", "there was a model that wrote", "\n"]


def folder_of(path: Path, name: str = "gqa", tokenizer: Tokenizer | None = TOKENIZER, **fields: Any) -> Path:
    """A model whose parameters are all random, published as a run would be."""
    config = small(name, vocab_size=TOKENIZER.vocab_size, **fields)
    model = randomise(ThinkerLM(config), seed=4)
    parameters = {key: value.detach().numpy() for key, value in model.named_parameters()}
    ids = {"bos_id": 1, "eos_ids": (2,), "pad_id": 0, "add_bos": True} if tokenizer is not None else {}
    template = DEFAULT_TEMPLATE if tokenizer is not None else None
    vocabulary = tokenizer.to_json() if tokenizer is not None else None
    write_view(path, 1, config, parameters, Publication(**ids, chat_template=template), vocabulary)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(folder):
    return load(folder, backend="torch")


# The same text as others


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' own Llama with random parameters and our tokenizer, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("theirs")
    config = transformers.LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = randomise(transformers.LlamaForCausalLM(config))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(TOKENIZER.to_json())
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "add_bos_token": true}'
    )
    return path, model


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_greedy_text_is_that_of_transformers_generate(theirs, backend):
    """Catches a bos too many or too few, a cache off by one, a norm that is left out: any slip, in short."""
    path, model = theirs
    llm = load(path, backend=backend)
    texts = llm.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)
    model.generation_config.eos_token_id = None
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = [1, *TOKENIZER.encode(prompt)]
        written = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
        assert len(set(written.tolist())) > 5, "a text of one token over and over would prove little"
        assert text == TOKENIZER.decode(written.tolist())


def test_sampling_s_penalty_is_that_of_transformers(theirs):
    """Catches a penalty that leaves out the prompt, or counts a token twice."""
    path, model = theirs
    llm = load(path, backend="torch")
    model.generation_config.eos_token_id = None
    ids = [1, *TOKENIZER.encode(PROMPTS[4])]
    written = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, repetition_penalty=1.3)
    text = llm.generate(PROMPTS[4], max_new_tokens=30, ignore_eos=True, repetition_penalty=1.3)
    assert text == TOKENIZER.decode(written[0, len(ids) :].tolist())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_text_is_the_same_alone_and_in_company(folder, backend):
    """Catches prompts that get each other's draws, and text that depends on the place in the list."""
    llm = load(folder, backend=backend, slots=3)
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "seed": 3}
    alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    assert llm.generate(PROMPTS, **options) == alone
    assert llm.generate(PROMPTS[::-1], **options) == alone[::-1]
    assert len(set(alone)) == len(PROMPTS)


def test_a_quantised_file_speaks_like_the_model_that_is_quantised_on_opening(tmp_path):
    """Catches a GGUF whose blocks are widened and rounded again, a wrong type by default, and names mixed up."""
    folder = folder_of(tmp_path / "whole", d_ff=64)
    export_gguf(open_model(folder), tmp_path / "small.gguf", "q8_0")
    whole, quantised = load(folder, dtype="int8"), load(tmp_path / "small.gguf")
    assert (whole.decoder.dtype, quantised.decoder.dtype) == ("int8", "int8")
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    texts = quantised.generate(PROMPTS, **options)
    assert texts == whole.generate(PROMPTS, **options)
    assert len(set(texts)) == len(PROMPTS)
    tokens = TOKENIZER.encode(PROMPTS[4])
    opened = (load(tmp_path / "small.gguf", dtype=dtype) for dtype in ("float32", None))
    exact, rounded = (llm.decoder.prefill(0, tokens) for llm in opened)
    # The same weights: what differs is keys and values, in float16, and what weights are multiplied with, in 16 bits.
    assert 0 < np.abs(exact - rounded).max() < 4 * 2**-11 * np.abs(exact).max()


# The calls


def test_what_load_returns(folder, llm):
    """Catches a name of the public contract that is missing or means something else."""
    assert llm.config.vocab_size == TOKENIZER.vocab_size
    assert llm.tokenizer.encode("small") == TOKENIZER.encode("small")
    assert isinstance(llm.model, ThinkerLM)
    assert llm.model is llm.model
    assert not llm.model.training
    assert isinstance(llm.decoder, TorchDecoder)
    assert llm.decoder.model is llm.model
    assert llm.generate("a", max_new_tokens=3) == llm.generate(["a"], max_new_tokens=3)[0]
    assert llm.generate([]) == []
    assert load(str(folder)).config == llm.config


def test_the_defaults_are_64_tokens_greedy(llm):
    """Catches a default of the contract that was changed; ctx_len 48 leaves fewer."""
    with pytest.warns(UserWarning, match="fill ctx_len 48"):
        (result,) = llm.generations(["a small"], ignore_eos=True)
    assert result.prompt_tokens + len(result.tokens) == 48
    assert Request((1,)).max_new_tokens == 64
    with pytest.warns(UserWarning, match="fill ctx_len 48"):
        assert llm.generate("a small", ignore_eos=True, temperature=0, seed=9) == result.text


def test_stream_gives_the_text_in_pieces(llm):
    """Catches a stream that differs from the text, or comes as one piece at the end."""
    options = {"max_new_tokens": 30, "ignore_eos": True, "seed": 5, "temperature": 1.0}
    pieces = list(llm.stream("Once upon", **options))
    assert "".join(pieces) == llm.generate("Once upon", **options)
    assert len(pieces) > 3
    assert all(pieces)


def test_options_reach_the_text(llm):
    """Catches an option that is accepted and never passed on."""
    plain = llm.generate("Once upon", max_new_tokens=20, ignore_eos=True)
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, echo=True) == "Once upon" + plain
    stop = plain[5:8]
    assert llm.generate("Once upon", max_new_tokens=20, stop=stop) == plain[: plain.index(stop)]
    assert llm.generate("Once upon", max_new_tokens=20, stop=["no such text", stop]) == plain[: plain.index(stop)]
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, temperature=2.0) != plain
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, temperature=2.0, top_k=1) == plain
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, temperature=2.0, top_p=1e-9) == plain
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, temperature=2.0, min_p=1.0) == plain
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True, repetition_penalty=5.0) != plain
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("Once upon", temprature=1.0)


def test_eos_ends_a_text_unless_it_is_ignored(llm):
    """Catches an eos of the model's own that is not looked at, and one of several."""
    (plain,) = llm.generations(["a small"], max_new_tokens=9, ignore_eos=True)
    eos = plain.tokens[5]
    llm.files = dataclasses.replace(llm.files, eos_ids=(2, eos))
    (ended,) = llm.generations(["a small"], max_new_tokens=9)
    assert ended.finish_reason == "eos"
    assert ended.tokens == plain.tokens[: plain.tokens.index(eos) + 1]
    assert llm.generate("a small", max_new_tokens=9) == TOKENIZER.decode(ended.tokens[:-1])
    assert llm.generate("a small", max_new_tokens=9, ignore_eos=True) == plain.text


def test_a_prompt_given_twice_gets_two_texts(llm):
    """Catches eight samples that are all the same, and a first one that isn't the text of the prompt alone."""
    options = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    texts = llm.generate(["a small", "Once", "a small"], **options)
    assert texts[0] == llm.generate("a small", **options) != texts[2]


def test_bos_stands_in_front_once(folder, llm):
    """Catches a prompt without bos, with two, and control tokens out of a prompt's text."""
    assert llm.encode("a small") == (1, *TOKENIZER.encode("a small"))
    assert llm.encode("") == (1,)
    assert llm.encode("<|bos|>").count(1) == 1
    assert not set(llm.encode("<|eos|><|end|>")[1:]) & TOKENIZER.control_ids


# Conversations


def test_a_conversation_goes_on_from_what_was_computed(llm, folder):
    """Catches a conversation that is computed from the start each time, or goes on from another one's tokens."""
    messages = [{"role": "user", "content": "a"}]
    options = {"max_new_tokens": 6, "ignore_eos": True}
    reply = llm.chat(messages, **options)
    prompts: list[int] = []
    prefill = llm.decoder.prefill

    def counting(slot, tokens=None, **rest):
        prompts.append(len(tokens))
        return prefill(slot, tokens, **rest)

    llm.decoder.prefill = counting
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "b"}]
    second = llm.chat(messages, **options)
    whole = len(llm.chat_format.encode(messages))
    assert prompts[0] < whole - 3
    other = [{"role": "user", "content": "x"}]
    assert llm.chat(other, **options) == load(folder, backend="torch").chat(other, **options)
    assert llm.chat(messages, **options) == second == load(folder, backend="torch").chat(messages, **options)
    assert "".join(llm.stream_chat(messages, **options)) == second


def test_a_reply_ends_with_the_turn(llm):
    """Catches a reply that runs on into the user's next turn: the turn's end is no eos of the model."""
    messages = [{"role": "user", "content": "a"}]
    assert llm.chat_format.end_id == TOKENIZER.special_ids[END]
    assert llm.files.eos_ids == (2,)
    whole = llm.chat(messages, max_new_tokens=12)
    ids = llm.engine._held[0][len(llm.chat_format.encode(messages)) :]  # what was said, but for the last token
    llm.chat_format.end_id = ids[4]
    assert llm.chat(messages, max_new_tokens=12) == TOKENIZER.decode(ids[: ids.index(ids[4])])
    assert llm.chat(messages, max_new_tokens=12, ignore_eos=True) == whole


def test_a_model_without_template_speaks_ours_if_it_has_the_tokens_for_it(tmp_path):
    """Catches a chat in plain text with a model that has no turns."""
    folder = folder_of(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    assert load(folder).chat_format.source == DEFAULT_TEMPLATE
    renamed = TOKENIZER.to_json().replace("<|user|>", "<|somebody|>")
    (folder / "tokenizer.json").write_text(renamed)
    with pytest.raises(ValueError, match="has no chat template, and its tokenizer no tokens for turns"):
        load(folder).chat([{"role": "user", "content": "x"}])


def test_a_tokenizer_or_template_that_is_broken_is_named(tmp_path):
    """Catches a line that says what is wrong, and not with which model."""
    folder = folder_of(tmp_path)
    good = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(good.replace('"BPE"', '"Nonsense"'))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: its tokenizer can't be used: not a tokenizer"):
        load(folder).generate("x")
    (folder / "tokenizer.json").write_text(good)
    (folder / "chat_template.jinja").write_text("{% for x %}")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: the chat template is not valid Jinja: line 1"):
        load(folder).chat([{"role": "user", "content": "x"}])


def test_a_tokenizer_that_leaves_text_out_is_told(tmp_path):
    """Catches a prompt of which the model reads less than was written, or nothing, without a word."""
    folder, notices = folder_of(tmp_path), []
    values = json.loads((folder / "tokenizer.json").read_text())
    assert values["model"]["vocab"].pop("æ")  # of 日
    (folder / "tokenizer.json").write_text(json.dumps(values))
    llm = load(folder, backend="torch", notice=notices.append)
    assert llm.generate("a", max_new_tokens=1)
    assert notices == []
    assert llm.generate(["a 日日", "日"], max_new_tokens=1)
    assert notices == [f"{folder}: its tokenizer has no tokens for '日': it is left out"]
    llm.chat([{"role": "user", "content": [{"type": "text", "text": "日本"}]}], max_new_tokens=1)
    assert notices[1:] == [f"{folder}: its tokenizer has no tokens for '本': it is left out"]
    with pytest.raises(ValueError, match="no tokens for '日'"):
        llm.evaluate(["a 日"])


def test_a_conversation_that_fills_the_context_is_refused_with_both_numbers(llm):
    """Catches an index error, or a silent cut, when a conversation has grown too long."""
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and leaves no room .* ctx_len 48"):
        llm.chat([{"role": "user", "content": "xyz" * 30}])


# Opening


def test_a_folder_without_tokenizer_has_a_model_and_says_what_texts_need(tmp_path):
    """Catches a model that can't be opened for want of a tokenizer, and an AttributeError instead of a reason."""
    llm = load(folder_of(tmp_path, tokenizer=None), backend="torch")
    assert llm.model(torch.tensor([[1, 2, 3]])).shape == (1, 3, TOKENIZER.vocab_size)
    assert llm.decoder.prefill(0, [1, 2, 3]).shape == (TOKENIZER.vocab_size,)
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.tokenizer,
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            call()


def test_a_longer_context_works_and_warns(folder):
    """Catches a limit that stays, or is raised without a word."""
    with pytest.warns(UserWarning, match="ctx_len 60 is more than the 48"):
        llm = load(folder, backend="torch", ctx_len=60)
    assert llm.config.ctx_len == 60
    with pytest.warns(UserWarning, match="fill ctx_len 60"):
        (result,) = llm.generations(["a"], max_new_tokens=100, ignore_eos=True)
    assert result.prompt_tokens + len(result.tokens) == 60
    assert load(folder, ctx_len=20).config.ctx_len == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda': choose among auto, native, torch"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"backend": "native", "dtype": "bfloat16"}, "with backend native choose among float32, int8"),
        ({"backend": "torch", "dtype": "int8"}, "with backend torch choose among float32, bfloat16"),
        ({"slots": 0}, "slots is 0"),
        ({"ctx_len": 0}, "ctx_len is 0: at least 1 is needed, and the model was trained on 48"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, options, message):
    """Catches a mistake that shows only when the first text is asked for."""
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_prompts_that_are_no_text_are_refused(llm):
    """Catches letters taken for prompts, and an error from the depths of a library."""
    with pytest.raises(ValueError, match="give a list of texts"):
        llm.generations("abc")
    with pytest.raises(ValueError, match="a prompt is 5: give a text"):
        llm.generate([5])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_torch_computes_in_the_type_that_was_asked_for(folder, dtype):
    """Catches a dtype that is read and never passed on, and parameters that were not copied."""
    exact, llm = load(folder, backend="torch", dtype="float64"), load(folder, dtype=dtype, backend="torch")
    assert all(parameter.dtype == getattr(torch, dtype) for parameter in llm.model.parameters())
    precision = float(torch.finfo(getattr(torch, dtype)).eps)
    expected, logits = exact.decoder.prefill(0, [1, 40, 41]), llm.decoder.prefill(0, [1, 40, 41])
    # Some hundred roundings in a row, each of relative size eps / 2, whose signs differ.
    np.testing.assert_allclose(logits, expected, atol=max(precision, 1e-7) * 30 * np.abs(expected).max())
    if dtype != "float64":
        assert not np.array_equal(logits, expected)


def test_dtypes_that_native_has_not_run_in_torch(folder):
    """Catches a type that auto refuses, or quietly replaces by float32."""
    llm = load(folder, dtype="float64")
    assert isinstance(llm.decoder, TorchDecoder)
    assert llm.model.head.weight.dtype == torch.float64


def test_where_native_cannot_auto_says_so_and_takes_torch(folder, monkeypatch):
    """Catches a model that can't be run because the faster way fails here, a silent change, and an idle accelerator."""

    def refuse(*_):
        raise NativeUnavailable("no native kernels on this machine: no\nvectors")

    monkeypatch.setattr("thinker.decode.native.open_native", refuse)
    notices: list[str] = []
    llm = load(folder, notice=notices.append)
    assert isinstance(llm.decoder, TorchDecoder)
    assert llm.generate("a", max_new_tokens=2)
    assert notices == ["computing in torch: no native kernels on this machine: no vectors"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices, move = [], ThinkerLM.to
    monkeypatch.setattr(ThinkerLM, "to", lambda model, device, *dtype: devices.append(device) or move(model, *dtype))
    for backend in ("auto", "torch"):
        _ = load(folder, backend=backend, notice=notices.append).decoder
    assert devices == ["cuda", "cuda"]
    for options in ({"backend": "native"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="no native kernels on this machine: no vectors"):
            _ = load(folder, **options).decoder


@pytest.mark.parametrize("missing", [("numba",), ("numba", "llvmlite")])
def test_without_numba_there_is_one_line_and_the_same_text(folder, tmp_path, missing):
    """Bug: a traceback where a compiler isn't installed, since its version is asked for, or the sampler has to have it.

    Neither may be asked for by its name, nor kernels be at hand that were compiled before.
    """
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    program = f"""
import importlib.metadata, sys
for name in {missing}:
    sys.modules[name] = None
version = importlib.metadata.version
def installed(name):
    if name in {missing}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
import thinker
llm = thinker.load({str(folder)!r}, notice=lambda line: print(line, file=sys.stderr))
print(llm.generate("Once upon", **{options}))
"""
    environment = os.environ | {"THINKER_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    (line,) = done.stderr.splitlines()
    assert line.startswith("computing in torch: no native kernels on this machine: ")
    assert done.stdout == load(folder, backend="torch").generate("Once upon", **options) + "\n"


def test_a_damaged_model_is_no_reason_to_change_the_way(tmp_path):
    """Catches a file's fault that is told as the processor's, and told again by torch."""
    folder = folder_of(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match="NaN"):
        _ = load(folder, notice=pytest.fail).decoder


def test_slots_are_as_many_as_memory_allows(folder):
    """Catches a long context that takes the memory of eight, and a prompt list that runs one by one."""
    assert load(folder).decoder.slots == 8
    assert slot_bytes(load(folder).config) == 2 * 3 * 2 * 48 * 8 * 4
    long = load(folder, ctx_len=1_000_000, notice=lambda _: None)
    assert long.decoder.slots == (1 << 30) // slot_bytes(long.config) == 2
    assert load(folder, slots=5).decoder.slots == 5


def test_evaluation_computes_as_the_model_speaks(folder, llm):
    """Catches figures of another model than the one that writes, or of a tokenizer's bos that is not the model's."""
    documents = ["Once upon a time", "there was a small model " * 9]
    slow, fast = llm.evaluate(documents), load(folder).evaluate(documents)
    assert (slow.tokens, slow.bytes) == (fast.tokens, fast.bytes)
    assert slow.loss == pytest.approx(fast.loss, rel=1e-5)


def test_evaluation_between_two_pieces_spoils_no_text(folder):
    """Catches a stream that goes on in a slot that evaluation has used."""
    llm = load(folder, backend="native", slots=1)
    whole = llm.generate("Once upon", max_new_tokens=20, ignore_eos=True)
    stream = llm.stream("Once upon", max_new_tokens=20, ignore_eos=True)
    next(stream)
    llm.evaluate(["there was a small model that wrote a story"])
    with pytest.raises(ValueError, match="interrupted by a newer one"):
        next(stream)
    assert llm.generate("Once upon", max_new_tokens=20, ignore_eos=True) == whole


def test_a_first_text_in_inference_mode_is_not_the_last(folder):
    """Catches memory that only the first call may write into."""
    llm = load(folder, backend="torch")
    with torch.inference_mode():
        text = llm.generate("a small", max_new_tokens=9)
    assert llm.generate("a small", max_new_tokens=9) == text


def test_native_speaking_imports_no_torch(folder):
    """Catches the five seconds that importing torch takes, before the first token; and the senses' share of them."""
    script = (
        "import sys, thinker\n"
        f"llm = thinker.load({str(folder)!r}, backend='native')\n"
        "assert llm.generate('a small', max_new_tokens=3, ignore_eos=True)\n"
        "assert llm.chat([{'role': 'user', 'content': 'a'}], max_new_tokens=3) is not None\n"
        "llm.evaluate(['a small'])\n"
        "assert 'torch' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('thinker.modality')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_reading_flags_asks_for_no_help(folder):
    """Catches a type of flag that tyro looks up with typeguard: a tenth of a short answer's time."""
    script = (
        "import sys\n"
        "from thinker.commands import chat, generate, parse\n"
        "for command in (chat, generate):\n"
        f"    options = parse(command.Options, 'x', [{str(folder)!r}, '--attach', 'a.png', '--attach', 'None'])\n"
        "    assert options.attach == ['a.png', 'None'], options.attach\n"
        "assert 'typeguard' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
