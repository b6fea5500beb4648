"""Held-out loss that steers: the best state is kept and published, a run that overfits ends, and all of it resumes."""

import json
import os
import signal

import numpy as np
import torch
from test_loop import ARCHITECTURE, Silent, assert_same, quiet, settings, weights

from thinker.checkpoint import training
from thinker.checkpoint.publish import repair
from thinker.formats import open_model
from thinker.train import held_out
from thinker.train.decide import repeatable
from thinker.train.held_out import LOOKS, look_is_due
from thinker.train.loop import fit
from thinker.train.start import begin, resume


def scripted(monkeypatch, losses):
    """Looks that find these losses, one after the other."""
    left = iter(losses)

    def loss(run):
        if run.looked is None or run.looked[0] != run.step:
            run.looked = (run.step, next(left))
        return run.looked[1]

    monkeypatch.setattr(held_out, "held_out_loss", loss)


def fitted(run, watcher=None):
    watcher = watcher or Silent()
    with repeatable(None):
        return fit(run, watcher), watcher


def begun(text, out, **changes):
    with repeatable(None):
        return begin(ARCHITECTURE, settings(text, out, **{"steps": LOOKS} | changes), set(), quiet)


def test_looks_come_at_fixed_shares_and_the_last_at_the_end():
    """Bug: looks by the clock, which no two runs share, or none at the end, so that the last state can't be best."""
    due = [k + 1 for k in range(24) if look_is_due(k / 24, (k + 1) / 24)]
    assert due == list(range(2, 25, 2))
    assert [k + 1 for k in range(5) if look_is_due(k / 5, (k + 1) / 5)] == [1, 2, 3, 4, 5]
    assert look_is_due(0.99, 1.07)


def test_the_best_state_is_published_and_never_pruned(text, tmp_path, monkeypatch):
    """Bug: others open the last, overfitted state; or the best one is deleted as an old one."""
    scripted(monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.6, 3.4, 3.3, 3.2, 3.1, 3.7, 3.8, 3.9])
    run = begun(text, tmp_path / "run", early_stop=99, keep=1, save_every=1e-9)
    at_best = {}
    watcher = Silent()
    watcher.after_step = lambda run, report: run.step == 3 and at_best.update(weights(run))
    fitted(run, watcher)
    assert (run.step, run.best.step, run.best.loss) == (LOOKS, 3, 3.0)
    assert sorted(p.name for p in (run.folder / "training").glob("step-*")) == ["step-00000003", f"step-{LOOKS:08d}"]
    assert open_model(run.folder).step == 3
    assert not repair(run.folder), "the view of the best state needs no repair"
    said = []
    run.take_published(said.append)
    assert_same(weights(run), at_best)
    assert "step 3" in said[0]
    assert "of 12 steps" in said[0]
    # Going on takes the newest state, starting from the model takes the best.
    with repeatable(None):
        assert resume(ARCHITECTURE, settings(text, run.folder), {"out"}, quiet).step == LOOKS
        tuned = begin(ARCHITECTURE, settings(text, tmp_path / "tuned", init=str(run.folder)), set(), quiet)
    assert_same(weights(tuned), at_best)


def test_a_run_that_overfits_ends_early_and_goes_on_only_when_told(text, tmp_path, monkeypatch):
    """Bug: patience counts looks that found better ones, or a resumed run forgets that it had ended."""
    scripted(monkeypatch, [5.0, 4.0, 4.1, 4.2, 3.9, 4.0, 4.1, 4.2] + [4.3, 3.8] + [4.3] * 20)
    run = begun(text, tmp_path / "run", early_stop=3)
    fitted(run)
    assert (run.step, run.best.step, run.overfits) == (8, 5, True)
    with repeatable(None):
        again = resume(ARCHITECTURE, settings(text, run.folder), {"out"}, quiet)
        fit(again, Silent())
        assert again.step == 8
        forced = resume(ARCHITECTURE, settings(text, run.folder, early_stop=0), {"out", "early_stop"}, quiet)
        fit(forced, Silent())
    assert forced.step == LOOKS
    assert open_model(run.folder).step == 10, "what turns out better is published, though nothing ends the run any more"
    said = []
    forced.take_published(said.append)
    assert "--early-stop 0" not in said[0]


def test_without_early_stop_the_last_state_is_published(text, tmp_path):
    """Bug: protection that nobody asked for."""
    run = begun(text, tmp_path / "run", early_stop=0)
    _, watcher = fitted(run)
    assert run.best is None
    assert open_model(run.folder).step == LOOKS
    assert watcher.looks == 0


def test_looks_that_steer_are_shown_too(text, tmp_path):
    """Bug: a protected run shows no held-out loss, or measures it twice."""
    run = begun(text, tmp_path / "run", early_stop=9)
    _, watcher = fitted(run)
    assert watcher.looks == LOOKS


def test_the_best_survives_an_interruption(text, tmp_path):
    """Bug: looks are counted from the process's start, or the best loss is lost, and another is published."""
    whole = begun(text, tmp_path / "whole", early_stop=9, lr=3e-2)
    fitted(whole)
    stopped = Silent()
    stopped.after_step = lambda run, report: run.step == 7 and os.kill(os.getpid(), signal.SIGINT)
    assert fitted(begun(text, tmp_path / "parts", early_stop=9, lr=3e-2), stopped)[0] == signal.SIGINT
    with repeatable(None):
        rest = resume(ARCHITECTURE, settings(text, tmp_path / "parts"), {"out"}, quiet)
        fit(rest, Silent())
    assert rest.best == whole.best
    assert_same(weights(whole), weights(rest))
    state = json.loads((training.latest(tmp_path / "parts") / "state.json").read_text())
    assert state["best"] == {"step": whole.best.step, "loss": whole.best.loss, "looks_since": whole.best.looks_since}


def test_what_is_looked_at_and_published_is_a_mean_of_late_weights(text, tmp_path):
    """Bug: others open the last weights, steps go on from the mean, or a look leaves it in the model's place."""
    run = begun(text, tmp_path / "run", early_stop=9, average=0.25, lr=3e-2)
    name = "blocks.0.mlp.down_proj.weight"
    mean, looked, last = torch.zeros(()), [], {}

    def step(run, report):
        nonlocal mean
        last.update(weights(run))
        share = 1 / min(run.step, LOOKS / 4)  # over all steps at first, then mostly over the last quarter
        mean = mean + share * (last[name].double() - mean)

    def validate(run):
        looked.append((held_out.held_out_loss(run), float((weights(run)[name] - mean).abs().max())))

    watcher = Silent()
    watcher.after_step, watcher.validate = step, validate
    fitted(run, watcher)
    assert len(looked) == LOOKS
    assert max(difference for _, difference in looked) < 1e-6
    assert_same(weights(run), last)  # the steps' own weights are back
    losses = [loss for loss, _ in looked]
    assert (run.best.step, run.best.loss) == (1 + int(np.argmin(losses)), min(losses))
    published = torch.from_numpy(np.array(open_model(run.folder).tensors[name]))
    assert (published - last[name]).abs().max() > 1e-4, "steps are large enough to tell them apart"
    run.take_published(quiet)
    assert torch.equal(weights(run)[name], published)
    run.looked = None
    assert held_out.held_out_loss(run) == min(losses)


def test_a_look_is_measured_once_a_step(text, tmp_path):
    """Bug: a loss of other parameters is shown again after they were replaced."""
    run = begun(text, tmp_path / "run", early_stop=9)
    first = held_out.held_out_loss(run)
    with torch.no_grad():
        run.model.head.weight.normal_()
    assert held_out.held_out_loss(run) == first
    run.step += 1
    assert held_out.held_out_loss(run) > first
