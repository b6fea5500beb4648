"""Running out of memory in a step: the batch is halved, the step stays the same, and it is remembered."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thinker.config import ThinkerConfig
from thinker.train import loop
from thinker.train.allocator import ran_out_of_memory
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable
from thinker.train.loop import fit, take_step
from thinker.train.run import OutOfMemory
from thinker.train.start import begin, resume

ARCHITECTURE = ThinkerConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=2, d_ff=64, ctx_len=32, dropout=0.0)
CPU_MESSAGE = "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."


class Watching:
    """A watcher that counts the halvings and can end the run."""

    def __init__(self, end_at=None):
        self.rows, self.end_at, self.losses = [], end_at, []

    def compiling(self, run):
        pass

    def out_of_memory(self, run):
        self.rows.append(run.rows_at_once)

    def after_step(self, run, report):
        self.losses.append(report.loss)
        if run.step == self.end_at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    def validate(self, run):
        pass


class Scarce:
    """The loss of a model for which memory lasts for so many rows, and breaks in the backward of later ones too."""

    def __init__(self, module, rows, error):
        self.module, self.rows, self.error = module, rows, error
        self.seen = []

    def __call__(self, tokens, targets):
        self.seen.append(len(tokens))
        parts = self.module(tokens, targets)
        if len(tokens) > self.rows:
            # In the backward: some gradients are there already when it fails.
            parts.total.register_hook(self.fail)
        return parts

    def fail(self, gradient):
        raise self.error


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "words.txt"
    draws = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(draws.choice(["eins", "two", "trois"], 9)) for _ in range(800)))

    def make(out="run", **changes):
        values = {"data": (str(path),), "out": tmp_path / out, "steps": 6, "batch_size": 8}
        fixed = {"precision": "float32", "compile": "off"}
        settings = TrainConfig.model_validate(values | fixed | changes)
        return settings, begin(ARCHITECTURE, settings, set(), lambda line: None)

    return make


def randomised(run):
    """Parameters without the zeros of the start, under which the gradients of the body vanish."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return run


ERRORS = [RuntimeError(CPU_MESSAGE), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "python", "cuda"])
@pytest.mark.parametrize(("rows", "accumulate"), [(8, 1), (7, 1), (4, 2)])
def test_a_split_step_has_the_gradients_of_the_whole_one(start, monkeypatch, error, rows, accumulate):
    """Bug: gradients of the failed attempt stay and count twice, a row is dropped, or a mean of means is taken."""
    found = []
    monkeypatch.setattr(
        loop,
        "clip",
        lambda parameters, most: found.append([p.grad.clone() for p in parameters]) or 1.0,
    )
    losses = []
    for scarce in (False, True):
        _, run = start(f"run{scarce}", batch_size=rows, accumulate=accumulate)
        randomised(run)
        module = Scarce(run.module, 2, error) if scarce else run.module
        told = []
        losses.append(take_step(run, module, 0.5, lambda run, told=told: told.append(run.rows_at_once))[0])
    assert told == [4, 2] if accumulate == 1 else told == [2]
    assert run.rows_at_once == 2
    assert sum(module.seen[-run.micro_batches :]) == rows * accumulate
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for whole, parts in zip(*found, strict=True):
        # Sums of some hundred float32 terms in another order.
        assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_a_split_is_said_recorded_and_kept_on_resuming(start, monkeypatch):
    """Bug: a run that resumes takes the large batch again, or a step counts other tokens after a split."""
    settings, run = start("whole", batch_size=4)
    wide = run.module.forward
    tight = {"on": True}

    def forward(tokens, targets, segments=None):
        if tight["on"] and len(tokens) > 2:
            raise RuntimeError(CPU_MESSAGE)
        return wide(tokens, targets)

    monkeypatch.setattr(run.module, "forward", forward)
    watching = Watching(end_at=3)
    with repeatable(None):
        fit(run, watching)
    assert watching.rows == [2]
    assert (run.step, run.tokens) == (3, 3 * 4 * 32)
    assert any("2 rows at once from step 1" in reason for reason in run.decisions.reasons)
    goes_on = resume(ARCHITECTURE, settings, {"out", "batch_size"}, lambda line: None)  # the same batch_size is named
    assert (goes_on.rows_at_once, goes_on.micro_batches, goes_on.settings.batch_size) == (2, 2, 4)
    run.settings = run.settings.changed(steps=6)
    later, rest = Watching(), Watching()
    with repeatable(None):
        fit(goes_on, rest)
        monkeypatch.setattr(run, "folder", run.folder.with_name("elsewhere"))
        fit(run, later)
    assert rest.losses == later.losses
    for (name, p), q in zip(run.model.named_parameters(), goes_on.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_what_a_split_compiles_anew_is_no_training(start, monkeypatch):
    """Bug: memory runs out in the midst of a run of minutes, half a minute of which is then spent on compiling."""
    _, run = start(minutes=1, steps=None)
    run.decisions = replace(run.decisions, compile=True)
    scarce, watching, told = Scarce(run.module, 99, MemoryError()), Watching(), []
    clock = {"now": 0.0, "compiled": False}

    def module(*rows):
        clock["now"] += 1 if clock["compiled"] else 1000
        clock["compiled"] = True
        return scarce(*rows)

    def after_step(run, report):
        if run.step == 3:
            scarce.rows = 2

    monkeypatch.setattr(loop, "step_module", lambda run: module)
    monkeypatch.setattr(torch.compiler, "reset", lambda: clock.update(compiled=False))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    watching.after_step, watching.compiling = after_step, lambda run: told.append((run.step, run.rows_at_once))
    with repeatable(None):
        fit(run, watching)
    assert watching.rows == [4, 2]
    assert told == [(0, 8), (3, 4)]
    # Three steps of a second, then some of four micro-batches each, to the end of the minute.
    assert (run.step, run.seconds) == (3 + 15, 3 + 15 * 4)


def test_held_out_text_is_looked_at_in_as_many_rows_as_the_memory_had_room_for(start, monkeypatch):
    """Bug: a run that was split trains on, and ends at its next look, which takes the large batch again."""
    _, run = start(batch_size=8, early_stop=2)
    wide = run.module.forward

    def forward(tokens, targets, segments=None):
        if len(tokens) > 2:
            raise RuntimeError(CPU_MESSAGE)
        return wide(tokens, targets)

    monkeypatch.setattr(run.module, "forward", forward)
    watching = Watching()
    with repeatable(None):
        fit(run, watching)
    assert watching.rows == [4, 2]
    assert run.best is not None


def test_a_compiled_run_is_split_too(start, monkeypatch):
    """Bug: the step that compiles is the first to run out of memory, and ends the run."""
    settings, whole = start("whole")
    _, run = start()
    expected, watching = Watching(), Watching()
    with repeatable(None):
        fit(whole, expected)
    run.decisions = replace(run.decisions, compile=True)
    scarce, compiled_anew = Scarce(run.module, 2, MemoryError()), []
    monkeypatch.setattr(loop, "step_module", lambda run: scarce)
    monkeypatch.setattr(torch.compiler, "reset", lambda: compiled_anew.append(run.rows_at_once))
    with repeatable(None):
        fit(run, watching)
    assert (watching.rows, compiled_anew) == ([4, 2], [8, 4, 2])
    assert set(scarce.seen[-4 * settings.steps :]) == {2}
    np.testing.assert_allclose(watching.losses, expected.losses, rtol=1e-4)


def test_one_row_too_many_is_an_error_with_remedies(start):
    """Bug: an endless loop at one row, or a traceback."""
    _, run = start(batch_size=2)
    with pytest.raises(ValueError, match=r"out of memory at step 1 with 1 row of ctx_len 32.*checkpoint-activations"):
        take_step(run, Scarce(run.module, 0, MemoryError()), 0.5)


@pytest.mark.parametrize("while_compiling", [False, True])
def test_what_was_trained_before_memory_ran_out_is_kept(start, monkeypatch, while_compiling):
    """Bug: another program takes the memory after an hour, and everything since the last save is lost."""
    settings, run = start()
    scarce, watching = Scarce(run.module, 99, MemoryError()), Watching()
    monkeypatch.setattr(loop, "step_module", lambda run: scarce)
    if while_compiling:  # for other rows, as at a ramp's next stage
        run.decisions = replace(run.decisions, compile=True)
        monkeypatch.setattr(loop, "_micro_rows", lambda run: run.step)

    def after_step(run, report):
        if run.step == 2:
            scarce.rows = 0

    watching.after_step = after_step
    with repeatable(None), pytest.raises(OutOfMemory, match=r"out of memory at step 3 .*; .* keeps the 2 steps until"):
        fit(run, watching)
    with repeatable(None):
        again = resume(ARCHITECTURE, settings, {"out"}, lambda line: None)
    assert again.step == 2
    for kept, left in zip(again.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(kept, left)


def test_other_errors_pass(start):
    """Bug: any RuntimeError, a wrong shape say, is taken for a lack of memory and tried again."""
    _, run = start()
    with pytest.raises(RuntimeError, match="shapes"):
        take_step(run, Scarce(run.module, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 0.5)
    assert run.decisions.split == 1


def test_the_allocator_of_this_torch_is_recognised():
    """Bug: another release words its message differently, and nothing is caught."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 60, np.uint8)
    assert ran_out_of_memory(refused.value)
    with pytest.raises(OSError) as missing:
        Path("/nowhere/at/all").read_bytes()
    assert not ran_out_of_memory(missing.value)
