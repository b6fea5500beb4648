"""The certificate: what it passes, and above all what it fails."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, small

from thinker.certificate import Truth, certify, find_truth, within
from thinker.certificate.elsewhere import AWKWARD_TEXTS, gguf_checks, verify_gguf
from thinker.certificate.llamacpp import Answers
from thinker.certificate.truth import FLOAT32_SHARE, ROUNDINGS_IN_A_BLOCK, swaying
from thinker.checkpoint.publish import Publication, write_view
from thinker.commands import parse
from thinker.commands.doctor import Options, run, show
from thinker.formats import Modality, open_model
from thinker.llm import load
from thinker.modality.settings import SensesConfig
from thinker.model import ThinkerLM
from thinker.tokenizer import Tokenizer

TEXTS = ["some words to make a tokenizer of, twice: some words to make a tokenizer of"]


@pytest.fixture
def folder(tmp_path):
    """publish(name): a small random model of that architecture as a folder, with a tokenizer."""

    def publish(name, **fields):
        tokenizer = Tokenizer.train(TEXTS, 320)
        config = small(name, vocab_size=tokenizer.vocab_size, **fields)
        model = randomise(ThinkerLM(config))
        arrays = {key: p.detach().numpy() for key, p in model.named_parameters()}
        publication = Publication(bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,), add_bos=True)
        write_view(tmp_path / name, 1, config, arrays, publication, tokenizer.to_json())
        return tmp_path / name

    return publish


def quiet(line):
    pass


@pytest.mark.parametrize("name", ["dense", "gqa_qk_norm", "moe_gqa_qk_norm", "plain_relu2", "tied"])
def test_an_honest_model_passes_everything(folder, name):
    """Bug: a check that compares different things, or one that never ran."""
    checks = certify(load(folder(name), "torch"), quiet)
    failed = [check for check in checks if check.passed is False]
    assert not failed, failed
    names = " ".join(check.name for check in checks)
    for way in ("torch: cached", "torch: a batch", "embeddings", "native: cached", "transformers", "llama.cpp"):
        assert way in names
    native = [check for check in checks if check.name.startswith("native:") and "float64" not in check.name]
    assert all(check.figure == 0 for check in native if check.figure is not None), "the same bytes are promised"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "llama.cpp was ended by SIGILL"),
        ("raise RuntimeError('no such instruction')", "llama.cpp failed: RuntimeError: no such instruction"),
        ("raise SystemExit", "llama.cpp failed: it said nothing"),
    ],
)
def test_a_crash_of_llama_cpp_is_a_line_of_the_certificate(folder, tmp_path, monkeypatch, code, words):
    """Bug: `thinker doctor` dies with it, or takes silence for agreement."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "llama_cpp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    llm = load(folder("dense"), "torch")
    tokens = np.arange(10)
    (check,) = verify_gguf(tmp_path / "model.gguf", llm, tokens, find_truth(llm, tokens))
    assert (check.passed, check.note) == (False, words)


def test_logits_that_are_no_numbers_fail_and_are_shown(folder, monkeypatch, capsys):
    """Bug: an export whose activations overflow llama.cpp's float16 leaves with 0, or ends in a line about NaN."""
    llm = load(folder("dense"), "torch")
    tokens = np.arange(10)
    truth = find_truth(llm, tokens)
    for bad in (np.nan, np.inf):
        logits = truth.logits.copy()
        logits[3, 5] = bad
        texts = [llm.tokenizer.encode(text) for text in AWKWARD_TEXTS]
        monkeypatch.setattr("thinker.certificate.elsewhere.ask", lambda *_, x=logits, t=texts: Answers(t, x, [0] * 32))
        for exact in (True, False):
            _, check, _ = verify_gguf(Path("model.gguf"), llm, tokens, truth, exact)
            assert check.passed is False
            show("logits", [check])
            assert "FAIL" in capsys.readouterr().out
    assert "try bf16 or f32" in check.note
    monkeypatch.setattr("thinker.commands.doctor.certify", lambda *_: [check])
    assert run(parse(Options, "doctor", [str(folder("dense")), "--json"])) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["checks"][0]["figure"] is None


def test_llama_cpp_is_asked_about_texts_as_the_tokenizer_normalises_them(folder, monkeypatch):
    """Bug: every model with Qwen's tokenizer fails, since llama.cpp doesn't normalise and is asked as if it did."""
    llm = load(folder("dense"), "torch")
    tokens = np.arange(10)
    truth, plain = find_truth(llm, tokens), llm.tokenizer

    def ask(path, texts, *_):
        return Answers([plain.encode(text) for text in texts], truth.logits, [0] * 32)

    monkeypatch.setattr("thinker.certificate.elsewhere.ask", ask)
    (check, *_) = verify_gguf(Path("model.gguf"), llm, tokens, truth)
    assert (check.passed, check.note) == (True, "")
    normalising = json.dumps(json.loads(llm.files.tokenizer_json) | {"normalizer": {"type": "NFC"}})
    llm.files = dataclasses.replace(llm.files, tokenizer_json=normalising)
    llm.__dict__["tokenizer"] = Tokenizer.from_json(normalising)
    assert plain.encode("e\u0301") != llm.tokenizer.encode("e\u0301")
    (check, *_) = verify_gguf(Path("model.gguf"), llm, tokens, truth)
    assert (check.passed, check.note) == (True, "in NFC: llama.cpp doesn't normalise")


def test_transformers_failing_is_a_line_of_the_certificate(folder, monkeypatch):
    """Bug: a width that its grouped products don't take ends `thinker doctor` in a traceback, and all it had found."""
    import transformers

    def forward(*_, **__):
        raise RuntimeError("strides should be multiple of 16 bytes\nException raised from …")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    checks = {check.name: check for check in certify(load(folder("dense"), "torch"), quiet)}
    check = checks["transformers equals Thinker"]
    assert (check.passed, check.note) == (False, "strides should be multiple of 16 bytes")
    assert checks["native: decoder equals torch in float64"].passed is True
    assert list(checks)[-1].startswith("llama.cpp"), "the next is asked all the same"


def test_what_no_other_program_can_run_is_said_and_does_not_fail(folder):
    """Bug: a gate that llama.cpp computes as silu is certified, or the whole certificate fails for want of a class."""
    checks = {check.name: check for check in certify(load(folder("gelu_gate"), "torch"), quiet)}
    left_out = checks["llama.cpp equals Thinker"]
    assert left_out.passed is None
    assert "gelu" in left_out.note


def test_what_gguf_cannot_carry_is_said_and_does_not_end_the_certificate(folder):
    """Bug: a model with eyes, or with a tokenizer that llama.cpp lacks, gets an error instead of a certificate."""
    llm = load(folder("dense"), "torch")
    tokens = np.arange(20) % llm.config.vocab_size
    truth = find_truth(llm, tokens)
    values = json.loads(llm.files.tokenizer_json) | {"pre_tokenizer": {"type": "Whitespace"}}
    foreign = dataclasses.replace(llm.files, tokenizer_json=json.dumps(values))
    (left_out,) = gguf_checks(foreign, llm, tokens, truth, quiet)
    assert left_out.passed is None
    assert left_out.note.startswith("llama.cpp has no name for how this tokenizer cuts text (['Whitespace'])")
    senses = Modality(SensesConfig.model_validate({"image": {"kind": "patches"}}), {})
    seeing = dataclasses.replace(llm.files, modality=senses)
    checks = gguf_checks(seeing, llm, tokens, truth, quiet)
    assert not [check for check in checks if check.passed is False], checks
    assert all("encoders" not in check.note for check in checks), "its text is compared without them"


def test_a_decoder_that_is_wrong_fails(folder, monkeypatch):
    """Bug: the certificate passes a cache that attends to position 0 only, since it compares a thing with itself."""
    from thinker.decode.torch_decoder import TorchDecoder

    honest = TorchDecoder.step
    monkeypatch.setattr(TorchDecoder, "step", lambda self, slots, tokens: honest(self, slots, np.asarray(tokens) // 2))
    checks = {check.name: check for check in certify(load(folder("dense"), "torch"), quiet)}
    assert checks["torch: cached equals uncached"].passed is False
    assert checks["torch: embeddings equal ids"].passed is True


def test_a_text_that_depends_on_how_many_tokens_a_call_draws_fails(folder, monkeypatch):
    """Bug: a drafted text is another than its tokens drawn one by one, and the certificate says nothing."""
    from thinker.decode.native.decoder import NativeDecoder

    honest = NativeDecoder.run

    def run(self, slots, tokens, draws, count=1, stop=()):
        drawn = honest(self, slots, tokens, draws, count, stop)
        return drawn ^ 1 if count > 1 else drawn

    monkeypatch.setattr(NativeDecoder, "run", run)
    checks = {check.name: check for check in certify(load(folder("dense"), "torch"), quiet)}
    assert checks["native: a text equals its tokens alone"].passed is False
    assert checks["torch: a text equals its tokens alone"].passed is True


def test_a_published_view_that_differs_from_the_network_fails(folder, monkeypatch):
    """Bug: transformers is asked about another folder than the model's."""
    path = folder("dense")
    llm = load(path, "torch")
    with torch.no_grad():
        llm.model.blocks[0].attn.out_proj.weight.mul_(1.01)
    checks = {check.name: check for check in certify(llm, quiet)}
    assert checks["transformers equals Thinker"].passed is False


def test_the_truth_is_computed_in_float64_and_leaves_the_model_as_it_was(folder):
    """Bug: the reference rounds as its judges do, or certifying a model changes its weights."""
    llm = load(folder("everything"), "torch")
    before = {name: p.detach().clone() for name, p in llm.model.named_parameters()}
    tokens = np.arange(20) % llm.config.vocab_size
    truth = find_truth(llm, tokens)
    assert truth.logits.dtype == np.float64
    with torch.no_grad():
        ours = llm.model.double()(torch.from_numpy(tokens)[None])[0].numpy()
    llm.model.float()
    np.testing.assert_array_equal(truth.logits, ours)
    assert (truth.sway > 0).all()
    assert truth.sway.max() < truth.share, "one rounding of the stream moves random weights' logits by more than that"
    for name, parameter in llm.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


def test_only_what_the_model_magnifies_is_tolerated():
    """Bug: a tolerance that grows with the errors it judges, or that condemns what no float32 can reach."""
    exact = np.array([[0.0, 10.0], [10.0, 0.0]])
    share = 10 * FLOAT32_SHARE
    steady = Truth(exact, exact + 1.0, np.zeros(2))
    assert steady.tolerance.tolist() == [share, share], "torch's own error excuses nobody's"
    truth = Truth(exact, exact, np.array([0.0, share]))
    assert truth.tolerance.tolist() == [share, share * ROUNDINGS_IN_A_BLOCK]
    assert (swaying(truth).figure, swaying(truth).passed) == (1, None)
    second = within("x", exact + np.array([[0.0], [2 * share]]), exact, truth.tolerance)
    assert second.passed is True
    both = within("x", exact + np.array([[2 * share], [3 * share]]), exact, truth.tolerance)
    assert (both.figure, both.tolerance, both.passed) == (pytest.approx(2 * share), share, False)


def test_weights_with_nan_fail_in_one_line(folder):
    """Bug: NaN compares as no difference."""
    path = folder("dense")
    llm = load(path, "torch")
    assert within("x", np.array([[0.0], [np.nan]]), np.ones((2, 1)), 1.0).passed is False
    assert within("x", np.array([[0.0], [np.inf]]), np.array([[0.0], [np.inf]]), 1.0).passed is False

    class Broken(dict):
        def __getitem__(self, name):
            raise ValueError(f"{name} holds NaN")

    llm.files = dataclasses.replace(llm.files, tensors=Broken(llm.files.tensors))
    checks = certify(llm, quiet)
    assert [check.passed for check in checks] == [False]
    assert "NaN" in checks[0].note


def test_exit_status_and_json(folder, capsys, monkeypatch):
    """Bug: a failed certificate exits with 0, or its JSON can't be read."""
    path = folder("dense")
    assert run(parse(Options, "doctor", [str(path), "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert len(report["checks"]) > 8
    for promise in ("FLOAT32_SHARE", "ROUNDINGS_IN_A_BLOCK"):
        monkeypatch.setattr(f"thinker.certificate.truth.{promise}", 0.0)
    assert run(parse(Options, "doctor", [str(path)])) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_long_context_costs_no_memory(folder, tmp_path, monkeypatch, capsys):
    """Bug: keys and values of forty thousand positions, where ninety-six are looked at, end the process."""
    from thinker.cache import KVCache
    from thinker.commands import export

    path, out, asked = folder("dense", ctx_len=40_960), tmp_path / "model.gguf", []
    honest = KVCache.empty
    monkeypatch.setattr(
        KVCache, "empty", lambda config, *a, **k: asked.append(config.ctx_len) or honest(config, *a, **k)
    )
    assert run(parse(Options, "doctor", [str(path)])) == 0
    assert 0 < max(asked) <= 256
    (tmp_path / "llama_cpp.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("thinker.commands.export.verify_gguf", lambda path, llm, *_, **__: asked.append(llm) or [])
    assert export.run(parse(export.Options, "export", [str(path), str(out)])) == 0
    assert asked[-1].config.ctx_len <= 256
    assert open_model(out).config.ctx_len == 40_960


@pytest.mark.parametrize(("ctx_len", "enough"), [(1, False), (2, False), (3, True), (9, True)])
def test_a_context_too_short_to_certify_is_said(folder, tmp_path, capsys, ctx_len, enough):
    """Bug: `thinker doctor` complains of an empty sequence, or compares none with none."""
    from thinker.commands import export

    path, out = folder("dense", ctx_len=ctx_len), tmp_path / "model.gguf"
    if enough:
        assert run(parse(Options, "doctor", [str(path)])) == 0
        return
    for command, given in (
        (run, parse(Options, "doctor", [str(path)])),
        (export.run, parse(export.Options, "export", [str(path), str(out)])),
    ):
        with pytest.raises(ValueError, match=f"ctx_len {ctx_len} is too short to certify: 3 is the least"):
            command(given)
    assert not out.exists()


def test_export_writes_checks_and_never_overwrites(folder, tmp_path, capsys):
    """Bug: yesterday's export is gone, or a file that llama.cpp reads differently passes."""
    from thinker.commands import export

    path, out = folder("gqa"), tmp_path / "model.gguf"
    assert export.run(parse(export.Options, "export", [str(path), str(out), "--type", "f32"])) == 0
    shown = capsys.readouterr()
    assert ("same greedy continuation" in shown.out) != ("llama-cpp-python is not installed" in shown.err)
    with pytest.raises(ValueError, match="--force"):
        export.run(parse(export.Options, "export", [str(path), str(out)]))
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        export.run(parse(export.Options, "export", [str(path), str(tmp_path / "model.bin")]))
    with pytest.raises(ValueError, match="gelu"):
        export.run(parse(export.Options, "export", [str(folder("gelu_gate")), str(tmp_path / "b.gguf")]))
    assert not (tmp_path / "b.gguf").exists()
    (tmp_path / "c.gguf").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export.run(parse(export.Options, "export", [str(path), str(tmp_path / "c.gguf"), "--force"]))
