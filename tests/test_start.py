"""How a run begins, goes on, or starts from a model: what is taken over, what is refused, and that nothing is lost."""

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_loop import ARCHITECTURE, Silent, assert_same, quiet, settings, train, weights

from thinker.checkpoint import training
from thinker.compiled.library import Kernel
from thinker.fused import kernels
from thinker.train import start
from thinker.train.decide import repeatable, versions
from thinker.train.loop import fit
from thinker.train.start import begin, resume


def test_a_new_run_never_overwrites_an_old_one(text, tmp_path):
    """Bug: a forgotten --out destroys last night's model."""
    train(text, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume.*--out"):
        begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet)


def test_a_new_run_never_replaces_a_model(text, tmp_path):
    """Bug: a model without its training, or one whose states are damaged, is written over by what begins there."""
    run, _ = train(text, tmp_path / "run", steps=1)
    (state,) = (run.folder / "training").glob("step-*")
    os.truncate(state / "optimizer.safetensors", 100)
    with pytest.raises(ValueError, match="already holds a run"):
        begin(ARCHITECTURE, settings(text, run.folder), set(), quiet)
    for _ in range(2):  # first damaged, then gone: the advice mustn't lead back to where it came from
        with pytest.raises(ValueError, match=r"holds no whole state to go on from: begin anew .*--out"):
            resume(ARCHITECTURE, settings(text, run.folder), {"out"}, quiet)
        shutil.rmtree(run.folder / "training", ignore_errors=True)
    with pytest.raises(ValueError, match=r"already holds a model.*--out"):
        begin(ARCHITECTURE, settings(text, run.folder, init=str(run.folder)), set(), quiet)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "metrics.jsonl"])
def test_a_new_run_never_replaces_a_persons_files(text, tmp_path, name):
    """Bug: a project's own config.json or measurements are written over, because --out names its folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=rf"run/{name}: a run would replace it: move it elsewhere, .*--out"):
        begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet)


def test_a_run_that_never_saved_may_begin_again(text, tmp_path):
    """Bug: the metrics of a run that was killed early keep its folder from everybody."""
    (tmp_path / "run").mkdir()
    for left in ("", '{"step": 1, "loss": 5.0}\n'):
        (tmp_path / "run" / "metrics.jsonl").write_text(left)
        with repeatable(None):
            assert begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet).step == 0


def test_two_processes_never_train_in_one_folder(text, tmp_path):
    """Bug: two runs of the same name mix their states, and the slower one ends at its first save."""
    begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet)
    program = (
        "import sys; from pathlib import Path; from thinker.checkpoint.training import claim; claim(Path(sys.argv[1]))"
    )
    same, other = (
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True)
        for name in ("run", "other")
    )
    assert "another process trains there: name another folder with --out" in same.stderr
    assert other.returncode == 0


def test_a_run_that_ended_while_another_began_is_not_replaced(text, tmp_path, monkeypatch):
    """Bug: the folder was free when it was looked at; a run came, finished and left, and is trained over."""
    other, _ = train(text, tmp_path / "other", steps=1)
    claim = training.claim

    def late(folder):
        shutil.copytree(other.folder, folder)
        claim(folder)

    monkeypatch.setattr(training, "claim", late)
    with repeatable(None), pytest.raises(ValueError, match="already holds a run"):
        begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet)


def test_a_run_goes_on_from_what_was_saved_before_it_was_claimed(text, tmp_path, monkeypatch):
    """Bug: a state is read, the process that trained there saves once more and leaves, and its steps are lost."""
    train(text, tmp_path / "run", steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "longer")
    with repeatable(None):
        fit(resume(ARCHITECTURE, settings(text, tmp_path / "longer", steps=4), {"out", "steps"}, quiet), Silent())
    claim = training.claim

    def late(folder):
        shutil.copytree(tmp_path / "longer", folder, dirs_exist_ok=True)
        claim(folder)

    monkeypatch.setattr(training, "claim", late)
    with repeatable(None):
        assert resume(ARCHITECTURE, settings(text, tmp_path / "run"), {"out"}, quiet).step == 4


def test_a_run_goes_on_with_its_threads_and_with_its_text_elsewhere(text, tmp_path):
    """Bug: sums in another order, as another number of threads adds them, or a text that was moved ends its run."""
    with repeatable(1):
        run = begin(ARCHITECTURE, settings(text, tmp_path / "run", steps=2, threads=1), set(), quiet)
        fit(run, Silent())
    moved = text.rename(tmp_path / "moved.txt")
    with repeatable(2):
        again = resume(ARCHITECTURE, settings(moved, tmp_path / "run", steps=3), {"out", "steps", "data"}, quiet)
        assert (torch.get_num_threads(), again.decisions.threads) == (1, 1)
    assert again.settings.data == (str(moved),)


def test_going_on_under_other_versions_is_said(text, tmp_path, monkeypatch):
    """Bug: a run that should repeat bit for bit goes on with another torch, and nobody is told."""
    train(text, tmp_path / "run", steps=1)
    monkeypatch.setattr(start, "versions", lambda: versions() | {"torch": "9.9"})
    said = []
    resume(ARCHITECTURE, settings(text, tmp_path / "run"), {"out"}, said.append)
    assert sum(line.endswith(f"where the run began: torch 9.9, not {torch.__version__}") for line in said) == 1


def test_going_on_with_other_kernels_is_said(text, tmp_path, monkeypatch):
    """Bug: a run goes on where its kernels are missing, or others, and steps round differently without a word."""
    numbers = kernels.numbers()
    if not kernels.multiplies(numbers):
        pytest.skip("there are no kernels for this processor")
    precision = "bfloat16" if numbers == torch.bfloat16 else "float32"
    run, _ = train(text, tmp_path / "run", steps=1, precision=precision)
    began = run.decisions.versions["kernels"]
    for hindrance, expected in ((None, 0), ("OSError: no room", 1)):
        monkeypatch.setattr(kernels, "hindrance", lambda dtype, why=hindrance: why)
        said = []
        resume(ARCHITECTURE, settings(text, run.folder), {"out"}, said.append)
        assert sum(line.endswith(f"where the run began: kernels torch's, not {began}") for line in said) == expected
        assert said.count("kernels: torch's alone, for want of Thinker's own (OSError: no room)") == expected


def test_states_that_do_not_name_their_kernels_go_on(text, tmp_path, monkeypatch):
    """Bug: a run that an older Thinker began ends in a KeyError, or is told that its kernels were None."""
    run, _ = train(text, tmp_path / "run", steps=1)
    load = training.load

    def older(path):
        saved = load(path)
        del saved.state["decisions"]["versions"]["kernels"]
        return saved

    monkeypatch.setattr(training, "load", older)
    said = []
    assert resume(ARCHITECTURE, settings(text, run.folder), {"out"}, said.append).step == 1
    assert not any("None" in line for line in said)


@pytest.mark.parametrize(("chosen", "told"), [("auto", True), ("float32", True), ("float16", False)])
def test_what_is_compiled_once_is_announced_where_it_is(text, tmp_path, monkeypatch, chosen, told):
    """Bug: six seconds in silence where a run goes on, or announced anew at each run that has no kernels at all."""
    line = "compiling kernels for this processor, some six seconds, once"
    monkeypatch.setattr(kernels, "numbers", lambda: torch.float32)
    monkeypatch.setattr(kernels, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(kernels, "is_available", lambda dtype: False)
    monkeypatch.setattr(kernels, "must_compile", lambda dtype: True)
    said = []
    with repeatable(None):
        fit(
            begin(ARCHITECTURE, settings(text, tmp_path / "run", steps=1, precision=chosen), set(), said.append),
            Silent(),
        )
        assert said.count(line) == told
        resume(ARCHITECTURE, settings(text, tmp_path / "run"), {"out"}, said.append)
    assert said.count(line) == 2 * told


def test_without_numba_a_run_begins_and_says_so(text, tmp_path, monkeypatch):
    """Bug: the question whether kernels must be compiled ends in a traceback, where Numba isn't installed."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    if not kernels.multiplies(torch.float32):
        pytest.skip("there are no kernels for this processor")
    monkeypatch.setattr(kernels, "numbers", lambda: torch.float32)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    alone = {
        torch.float32: tuple(
            Kernel(one.module, one.name, one.arguments, one.sources) for one in kernels.KERNELS[torch.float32]
        )
    }
    monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS | alone)
    kernels.hindrance.cache_clear()
    said = []
    try:
        with repeatable(None):
            begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), said.append)
    finally:
        kernels.hindrance.cache_clear()
    assert sum(line.startswith("kernels: torch's alone, for want of Thinker's own (PackageNot") for line in said) == 1
    assert not any(line.startswith("compiling kernels") for line in said)


def test_a_compiled_run_that_goes_on_without_a_compiler_is_told_in_one_line(text, tmp_path, monkeypatch):
    """Bug: torch's own traceback of many lines where a run was copied to a machine without a C++ compiler."""
    run, _ = train(text, tmp_path / "run", steps=2)
    run.decisions = dataclasses.replace(run.decisions, compile=True)
    run.save()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with repeatable(None):
        with pytest.raises(ValueError, match=r"run: its steps are compiled, but no C\+\+ compiler .*: install"):
            resume(ARCHITECTURE, settings(text, run.folder, steps=3), {"out", "steps"}, quiet)
        fit(resume(ARCHITECTURE, settings(text, run.folder), {"out"}, quiet), Silent())  # nothing left to compile


def test_a_configuration_resumes_the_run_it_made(text, tmp_path):
    """Bug: vocab_size, a ceiling, is compared with what the text came to."""
    ceiling = ARCHITECTURE.changed(vocab_size=5000)
    run, _ = train(text, tmp_path / "run", ceiling, steps=2)
    assert run.config.vocab_size < 5000
    assert resume(ceiling, settings(text, run.folder), {"out", "vocab_size"}, quiet).step == 2
    with repeatable(None):
        begin(ceiling, settings(text, tmp_path / "next", init=str(run.folder)), {"vocab_size"}, quiet)
    with pytest.raises(ValueError, match="vocab_size is"):
        resume(ARCHITECTURE.changed(vocab_size=270), settings(text, run.folder), {"out", "vocab_size"}, quiet)


def test_resume_refuses_what_would_steer_other_steps(text, tmp_path):
    """Bug: a changed learning rate or a changed text is silently accepted and the run is no longer itself."""
    train(text, tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match=r"seed is 0 in this run"):
        resume(ARCHITECTURE, settings(text, tmp_path / "run", seed=1), {"out", "seed"}, quiet)
    with pytest.raises(ValueError, match="holds no state to go on from: leave out --resume"):
        resume(ARCHITECTURE, settings(text, tmp_path / "nowhere"), {"out"}, quiet)
    longer = resume(ARCHITECTURE, settings(text, tmp_path / "run", steps=9), {"out", "steps"}, quiet)
    assert (longer.step, longer.settings.steps, longer.progress()) == (2, 9, 2 / 9)
    text.write_text(text.read_text(encoding="utf-8") + "more\n" * 50, encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since"):
        resume(ARCHITECTURE, settings(text, tmp_path / "run"), {"out"}, quiet)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_init_starts_from_a_models_exact_weights_and_tokenizer(text, tmp_path, average):
    """Bug: fine-tuning starts from folded, freshly drawn or unpublished weights, or trains another tokenizer."""
    first, _ = train(text, tmp_path / "first", ARCHITECTURE.changed(layer_scale=0.3), average=average)
    with repeatable(None):
        second = begin(
            ARCHITECTURE.changed(dropout=0.0),
            settings(text, tmp_path / "second", init=str(tmp_path / "first")),
            {"dropout"},
            quiet,
        )
    assert second.config == first.config.changed(dropout=0.0)
    with first.shown():  # where the settings want means of late weights, these are what was published
        assert_same(weights(first), weights(second))
    assert second.tokenizer.to_json() == first.tokenizer.to_json()
    with pytest.raises(ValueError, match=r"d_model is 32 there and 64 was asked for"):
        begin(
            ARCHITECTURE.changed(d_model=64),
            settings(text, tmp_path / "third", init=str(tmp_path / "first")),
            {"d_model"},
            quiet,
        )


@pytest.mark.parametrize(("ctx_len", "given", "said"), [(48, {"ctx_len"}, 1), (16, {"ctx_len"}, 0), (48, set(), 0)])
def test_a_longer_context_than_the_models_is_said(text, tmp_path, ctx_len, given, said):
    """Bug: a model is published with a context that it has hardly seen the end of, and nobody is told."""
    train(text, tmp_path / "first", steps=1)
    lines: list[str] = []
    with repeatable(None):
        wanted = settings(text, tmp_path / "second", init=str(tmp_path / "first"))
        begin(ARCHITECTURE.changed(ctx_len=ctx_len), wanted, given, lines.append)
    warning = f"ctx_len {ctx_len} is more than the 32 that {tmp_path / 'first'} was trained on"
    assert sum(warning in line for line in lines) == sum("was trained on" in line for line in lines) == said


def test_a_tokenizer_that_cannot_be_had_is_refused(text, tmp_path):
    """Bug: --tokenizer beside --init, or --vocab-size beside a file of more tokens, is ignored in silence."""
    first, _ = train(text, tmp_path / "first", steps=1)
    file = tmp_path / "first" / "tokenizer.json"
    for tokenizer in ("char", str(file)):
        wanted = settings(text, tmp_path / "second", init=str(tmp_path / "first"), tokenizer=tokenizer)
        with pytest.raises(ValueError, match=rf"first: keeps its own tokenizer, and tokenizer {tokenizer} was asked"):
            begin(ARCHITECTURE, wanted, {"init", "tokenizer"}, quiet)
    wanted, size = settings(text, tmp_path / "third", tokenizer=str(file)), first.config.vocab_size
    smaller = ARCHITECTURE.changed(vocab_size=size - 1)
    with pytest.raises(
        ValueError, match=rf"json: has {size} tokens .*more than vocab_size {size - 1}: raise vocab_size"
    ):
        begin(smaller, wanted, {"tokenizer", "vocab_size"}, quiet)
    for architecture, given in ((ARCHITECTURE.changed(vocab_size=size), {"vocab_size"}), (smaller, set())):
        with repeatable(None):
            taken = begin(architecture, wanted, {"tokenizer", *given}, quiet)
        assert taken.config.vocab_size == taken.tokenizer.vocab_size == size
        assert taken.tokenizer.encode("alpha über") == first.tokenizer.encode("alpha über")


def test_what_another_program_trained_further_is_taken_and_never_replaced(text, tmp_path):
    """Bug: a run's folder with weights tuned elsewhere starts from the old ones, or a run writes over them."""
    train(text, tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    tuned = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(tuned, path, {"format": "pt"})
    (tmp_path / "run" / "thinker.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: was not written by Thinker and stays"):
        resume(ARCHITECTURE, settings(text, tmp_path / "run"), {"out"}, quiet)
    with repeatable(None):
        run = begin(ARCHITECTURE, settings(text, tmp_path / "next", init=str(tmp_path / "run")), set(), quiet)
    np.testing.assert_array_equal(run.model.norm.scale.detach().numpy(), tuned["model.norm.weight"])
