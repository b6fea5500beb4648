"""The training loop and the run it works on: repeatable, resumable, exact."""

import dataclasses
import json
import os
import signal
import threading
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomise

from thinker import load
from thinker.certificate import certify
from thinker.checkpoint import training
from thinker.config import ThinkerConfig
from thinker.data.batches import Batches
from thinker.formats import open_model
from thinker.formats.gguf_export import export_gguf
from thinker.loss import IGNORE, LossParts, NextTokenLoss
from thinker.model import ThinkerLM
from thinker.train import loop
from thinker.train.config import TrainConfig
from thinker.train.decide import dropout_seed, repeatable
from thinker.train.loop import Diverged, fit, take_step
from thinker.train.optim import rate
from thinker.train.start import begin, resume

ARCHITECTURE = ThinkerConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=2, d_ff=64, ctx_len=32, dropout=0.1)


class Silent:
    """A watcher that keeps the losses."""

    def __init__(self):
        self.losses = []
        self.looks = 0

    def compiling(self, run):
        pass

    def out_of_memory(self, run):
        pass

    def after_step(self, run, report):
        self.losses.append(report.loss)

    def validate(self, run):
        self.looks += 1


def settings(text, out, **changes):
    values = {"data": (str(text),), "out": out, "steps": 6, "batch_size": 4, "precision": "float32", "compile": "off"}
    return TrainConfig.model_validate(values | changes)


def quiet(line):
    pass


def train(text, out, architecture=ARCHITECTURE, **changes):
    with repeatable(None):
        run = begin(architecture, settings(text, out, **changes), set(), quiet)
        watcher = Silent()
        fit(run, watcher)
    return run, watcher


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs by {(first[name] - second[name]).abs().max()}"


def test_it_learns(text, tmp_path):
    """Bug: gradients never reach the weights, or the schedule never leaves zero."""
    _, watcher = train(text, tmp_path / "run", steps=60, lr=1e-2, cooccurrence=0)
    assert watcher.losses[0] == pytest.approx(np.log(300), abs=0.15)  # a zero head guesses uniformly
    assert watcher.losses[-1] < 3.0


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"accumulate": 2, "checkpoint_activations": True}])
def test_a_run_repeats_bit_for_bit(text, tmp_path, options):
    """Bug: dropout, order or an uninitialised buffer depends on what ran before."""
    first, _ = train(text, tmp_path / "a", **options)
    torch.rand(7)  # whatever another computation does to the global generator
    second, _ = train(text, tmp_path / "b", **options)
    assert_same(weights(first), weights(second))


def test_a_run_inherits_by_its_tokenizers_merges(text, tmp_path):
    """Bug: the setting reaches no optimiser, or rows of another numbering move together."""
    assert not any(
        "inheritance" in group
        for one in begin(ARCHITECTURE, settings(text, tmp_path / "a", inherit=0.0), set(), quiet).optimizers
        for group in one.param_groups
    )
    run = begin(ARCHITECTURE, settings(text, tmp_path / "b", inherit=0.5), set(), quiet)
    (group,) = [group for one in run.optimizers for group in one.param_groups if "inheritance" in group]
    parts = run.corpus.tokenizer.parts()
    merged = parts[:, 0] >= 0
    assert merged.sum() == 300 - 288
    own = torch.randn(300, 3)
    rows = group["inheritance"].spread(own)
    torch.testing.assert_close(rows[merged], own[merged] + 0.5 * rows[parts[merged]].sum(dim=1))
    assert torch.equal(rows[~merged], own[~merged])


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ({}, {}),
        ({}, {"optimizer": "adamw", "accumulate": 2}),
        ({"use_moe": True, "num_experts": 4}, {}),
        ({"use_qk_norm": True, "use_gqa": True, "layer_scale": 0.1}, {}),
        ({"tie_embeddings": True}, {}),
        ({}, {"ramp": 5, "accumulate": 2, "schedule": "wsd"}),
        ({}, {"early_stop": 2, "steps": 8, "keep": 1}),
        ({}, {"inherit": 0.5, "weight_decay": 0.5}),
        ({}, {"average": 0.4, "early_stop": 2, "steps": 8}),
    ],
)
def test_save_and_resume_equals_going_on(text, tmp_path, architecture, options, monkeypatch):
    """Bug: batches start anew, dropout's generator is restored and then advanced, an optimiser loses its state."""
    config = ARCHITECTURE.changed(**architecture)
    whole, watched = train(text, tmp_path / "whole", config, **options)

    stopped = Silent()
    stopped.after_step = lambda run, report: run.step == 3 and os.kill(os.getpid(), signal.SIGINT)
    with repeatable(None):
        run = begin(config, settings(text, tmp_path / "parts", **options), set(), quiet)
        assert fit(run, stopped) == signal.SIGINT
        assert run.step == 3
        goes_on = resume(ARCHITECTURE, settings(text, tmp_path / "parts"), {"out"}, quiet)
        assert goes_on.step == 3
        rest = Silent()
        fit(goes_on, rest)
    assert_same(weights(whole), weights(goes_on))
    assert rest.losses == watched.losses[3:]
    published, again = (open_model(run.folder).tensors for run in (whole, goes_on))
    assert all(np.array_equal(published[name], again[name]) for name in published)


def test_going_on_with_a_finished_run_only_publishes(text, tmp_path, monkeypatch):
    """Bug: half a minute of compiling for no step, and the last state saved again, for which the one before it goes."""
    run, _ = train(text, tmp_path / "run", steps=3, save_every=1e-9)
    states = sorted((run.folder / "training").glob("step-*"))
    assert [path.name for path in states] == ["step-00000002", "step-00000003"]
    (run.folder / "thinker.json").unlink()
    monkeypatch.setattr(loop, "warm_up", None)
    with repeatable(None):
        again = resume(ARCHITECTURE, settings(text, run.folder), {"out"}, quiet)
        again.decisions = dataclasses.replace(again.decisions, compile=True)
        fit(again, Silent())
    assert sorted((run.folder / "training").glob("step-*")) == states
    assert (run.folder / "thinker.json").exists(), "a view that lags catches up"


@pytest.mark.slow
def test_compiled_training_repeats_and_resumes_bit_for_bit(text, tmp_path):
    """Bug: compiled code on two threads reads uninitialised memory or adds in another order every time."""
    options = {"compile": "on", "precision": "bfloat16"}
    whole, _ = train(text, tmp_path / "whole", **options)
    again, _ = train(text, tmp_path / "again", **options)
    assert_same(weights(whole), weights(again))
    stopped = Silent()
    stopped.after_step = lambda run, report: run.step == 3 and os.kill(os.getpid(), signal.SIGINT)
    with repeatable(None):
        fit(begin(ARCHITECTURE, settings(text, tmp_path / "parts", **options), set(), quiet), stopped)
        goes_on = resume(ARCHITECTURE, settings(text, tmp_path / "parts"), {"out"}, quiet)
        fit(goes_on, Silent())
    assert_same(weights(whole), weights(goes_on))


def test_accumulation_weighs_ragged_rows_by_their_tokens(text, tmp_path, monkeypatch):
    """Bug: a mean of micro-batch means, which gives short rows too much weight."""
    architecture = ARCHITECTURE.changed(dropout=0.0)

    class Ragged(Batches):
        def batch(self, k):
            inputs, targets = super().batch(k)
            targets = targets.copy()
            for row in range(len(targets)):
                targets[row, : 9 * row] = -100
            return inputs, targets

    gradients = []
    for accumulate, rows in ((1, 4), (2, 2), (4, 1)):
        with repeatable(None):
            options = settings(text, tmp_path / f"run{accumulate}", batch_size=rows, accumulate=accumulate, clip=1e9)
            run = begin(architecture, options, set(), quiet)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.normal_(std=0.1)
        run.model.double()
        run.batches = Ragged(run.corpus.train, 4, 32, 0)
        kept = {}
        for optimizer in run.optimizers:
            monkeypatch.setattr(optimizer, "step", lambda *_: None)
            monkeypatch.setattr(
                optimizer,
                "zero_grad",
                lambda run=run, kept=kept, **_: kept.update(
                    {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
                ),
            )
        loss, _, _ = take_step(run, run.module, 1.0)
        gradients.append((loss, kept))
    for loss, kept in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-12)
        assert kept.keys() == gradients[0][1].keys() == dict(run.model.named_parameters()).keys()
        for name, gradient in kept.items():
            torch.testing.assert_close(gradient, gradients[0][1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_gradients_are_scaled_together_where_their_norm_is_too_large(most):
    """Bug: each tensor has a norm of its own, a vector is left out, or what is small enough is made larger."""
    draws = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(40, 30), (3, 20, 10), (7,), (5, 5)]]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=draws)
    before = [parameter.grad.clone() for parameter in parameters[:-1]]
    norm = torch.cat([grad.flatten() for grad in before]).double().norm().item()
    assert loop.clip(parameters, most) == pytest.approx(norm, rel=1e-6)
    for parameter, grad in zip(parameters, before, strict=False):
        if most > norm:
            assert torch.equal(parameter.grad, grad)
        else:
            torch.testing.assert_close(parameter.grad, grad * (most / norm), rtol=1e-5, atol=0)
    assert parameters[-1].grad is None


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_mixtures_gradients_are_those_of_both_losses(text, tmp_path, weight):
    """Bug: the balance loss is measured and never learned from, or weighs as one micro-batch whatever its tokens."""
    config = ARCHITECTURE.changed(use_moe=True, num_experts=4, balance_loss=weight, dropout=0.0)
    run = begin(config, settings(text, tmp_path / "run", accumulate=2), set(), quiet)
    randomise(run.model.double())
    inputs, targets = (torch.from_numpy(rows) for rows in run.batches.batch(0))
    targets[:3, 5:] = IGNORE
    counted = int((targets != IGNORE).sum())
    micros = [run.module(*halves) for halves in zip(inputs.chunk(2), targets.chunk(2), strict=True)]
    objective = sum(parts.total + weight * parts.balance * parts.tokens for parts in micros) / counted
    expected = torch.autograd.grad(objective, list(run.model.parameters()))
    loop.gradients(run, run.module, (inputs.numpy(), targets.numpy()), counted)
    for (name, parameter), gradient in zip(run.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("without", [{0}, {1}, {0, 1}])
def test_rows_that_teach_nothing_are_counted_and_passed_over(text, tmp_path, without, precision):
    """Bug: text without a picture ends a run that trains senses alone, since its loss depends on nothing trained."""
    with repeatable(None):
        options = settings(text, tmp_path / "run", accumulate=2, precision=precision, cooccurrence=0)
        run = begin(ARCHITECTURE, options, set(), quiet)
        plain = weights(run)
        seen = count()

        def module(*rows):
            parts = run.module(*rows)
            return LossParts(*(part.detach() for part in parts)) if next(seen) in without else parts

        loss, _, norm = take_step(run, module, 1.0)
        assert loss == pytest.approx(np.log(300), abs=0.15)
        assert (norm > 0) == (len(without) == 1)
        moved = any(not torch.equal(value, plain[name]) for name, value in weights(run).items())
        assert moved == (len(without) == 1)
        assert take_step(run, run.module, 1.0)[2] > 0


def test_every_update_is_of_a_clipped_gradient(text, tmp_path):
    """Bug: the norm is told and nothing is clipped, or the settings' clip isn't what it is held to."""
    run = begin(ARCHITECTURE, settings(text, tmp_path / "run", clip=1e-3, steps=3), set(), quiet)
    norms, told = {}, []

    def look(*_):
        rows = [parameter.grad.flatten() for parameter in run.model.parameters() if parameter.grad is not None]
        norms[run.step] = float(torch.cat(rows).norm())

    run.optimizers[0].register_step_pre_hook(look)  # the first one's, as each forgets its gradients after its step
    watcher = Silent()
    watcher.after_step = lambda run, report: told.append(report.grad_norm)
    fit(run, watcher)
    assert norms == pytest.approx(dict.fromkeys(range(3), 1e-3), rel=1e-4)  # torch divides by norm + 1e-6
    assert min(told) > 0.01


def test_every_update_is_at_the_schedules_rate(text, tmp_path):
    """Bug: rates stay at their peaks, one optimiser's do, or warm-up, cool-down and schedule never reach the step."""
    schedule = {"schedule": "wsd", "warmup": 0.25, "cooldown": 0.5}
    run = begin(ARCHITECTURE, settings(text, tmp_path / "run", steps=8, **schedule), set(), quiet)
    rates = {}  # by step and optimiser, as torch may call a hook for a class and for its base
    for place, optimizer in enumerate(run.optimizers):
        peaks = [group["lr"] for group in optimizer.param_groups]
        assert set(peaks) <= {run.settings.lr, run.settings.muon_lr}

        def note(optimizer, *_, place=place, peaks=peaks):
            shares = [group["lr"] / peak for group, peak in zip(optimizer.param_groups, peaks, strict=True)]
            rates[run.step, place] = shares

        optimizer.register_step_pre_hook(note)
    fit(run, Silent())
    shares = [rate(step / 8, **schedule) for step in range(8)]
    assert len(set(shares)) > 4
    assert {at: pytest.approx([shares[at[0]]] * len(row)) for at, row in rates.items()} == rates
    assert len(rates) == 8 * len(run.optimizers)


def test_every_micro_batch_draws_its_own_dropout(text, tmp_path, monkeypatch):
    """Bug: the same neurons are dropped at every step, or in every micro-batch of one, or whatever the seed."""
    run = begin(ARCHITECTURE, settings(text, tmp_path / "run", steps=3, accumulate=2, seed=5), set(), quiet)
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    fit(run, Silent())
    assert seeds == [dropout_seed(5, step, micro) for step in range(3) for micro in range(2)]
    assert len(set(seeds)) == 6


def test_a_run_of_minutes_ends_by_the_clock(text, tmp_path, monkeypatch):
    """Bug: time spent in steps ends no run, or its schedule follows the number of steps."""
    run = begin(ARCHITECTURE, settings(text, tmp_path / "run", steps=None, minutes=0.25), set(), quiet)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=count(0, 4).__next__))  # read twice a step
    reports, watcher = [], Silent()
    watcher.after_step = lambda run, report: reports.append(report)
    assert fit(run, watcher) is None
    assert (run.step, run.seconds) == (4, 16)
    done = [0, 4 / 15, 8 / 15, 12 / 15, 1]
    assert [report.progress for report in reports] == pytest.approx(done[1:])
    shares = [rate(progress, schedule="linear", warmup=run.settings.warmup) for progress in done[:-1]]
    assert [report.lr for report in reports] == pytest.approx([share * run.settings.lr for share in shares])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(text, tmp_path):
    """Bug: NaN weights overwrite the last good checkpoint."""
    watcher = Silent()

    def poison(run, report):
        if run.step == 2:
            run.save()
            with torch.no_grad():
                run.model.tok_emb.weight.fill_(float("nan"))

    watcher.after_step = poison
    with repeatable(None):
        run = begin(ARCHITECTURE, settings(text, tmp_path / "run"), set(), quiet)
        with pytest.raises(Diverged, match=r"step 3: the loss is nan at learning rates .* try"):
            fit(run, watcher)
    newest = training.latest(tmp_path / "run")
    assert newest is not None
    saved = training.load(newest)
    assert saved.step == 2
    assert np.isfinite(saved.parameters["tok_emb.weight"]).all()


def test_the_published_view_is_the_model(text, tmp_path):
    """Bug: what others open is an older step, or the unfolded layer scale."""
    from thinker.formats import open_model
    from thinker.parameters import load_parameters

    run, _ = train(text, tmp_path / "run", ARCHITECTURE.changed(layer_scale=0.3, dropout=0.0))
    files = open_model(tmp_path / "run")
    published = ThinkerLM(files.config)
    load_parameters(published, files.tensors, "published")
    tokens = torch.randint(0, 300, (2, 32))
    with torch.no_grad():
        ours = run.model.eval()(tokens)
        torch.testing.assert_close(published.eval()(tokens), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


def test_states_hold_what_they_say(text, tmp_path):
    """Bug: a state without what going on needs."""
    run, _ = train(text, tmp_path / "run", steps=3, keep=1)
    states = list((tmp_path / "run" / "training").glob("step-*"))
    assert [path.name for path in states] == ["step-00000003"]
    state = json.loads((states[0] / "state.json").read_text(encoding="utf-8"))
    assert state["tokens"] == 3 * 4 * 32
    assert state["decisions"]["precision"] == "float32"
    assert state["settings"]["batch_size"] == 4
    assert run.config.vocab_size == run.tokenizer.vocab_size <= 300


def test_interruption_needs_the_main_thread_only_for_signals(text, tmp_path):
    """Bug: training inside a notebook's or a server's thread fails because signal handlers can't be set there."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(train(text, tmp_path / "run", steps=2)[0].step))
    thread.start()
    thread.join()
    assert outcome == [2]


def test_a_second_ctrl_c_ends_at_once():
    """Bug: a run that hangs can't be stopped."""
    before = signal.getsignal(signal.SIGINT)
    with loop.until_interrupted() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpointed_activations_leave_gradients_as_they_are():
    """Bug: recomputation draws other dropout, or drops the cache argument."""
    from thinker.train.memory import checkpoint_activations

    config = ARCHITECTURE
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ThinkerLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        if recompute:
            checkpoint_activations(model)
        tokens = torch.randint(0, 300, (2, 32))
        torch.manual_seed(1)
        NextTokenLoss(model)(tokens, tokens).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*gradients)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_trained_mixture_makes_the_round_trip_through_both_formats(text, tmp_path, scaled):
    """Bug: random weights come back, but those of a run lose the experts' order, a norm near 1, or a bit."""
    transformers = pytest.importorskip("transformers")
    architecture = ARCHITECTURE.changed(
        use_moe=True, num_experts=4, use_qk_norm=True, use_gqa=True, layer_scale=0.5 if scaled else None
    )
    train(text, tmp_path / "run", architecture, steps=8)
    run = open_model(tmp_path / "run")
    state = training.load(training.latest(tmp_path / "run"))
    if not scaled:  # a layer's scale is folded into its matrices on publishing
        for name, parameter in state.parameters.items():
            assert np.asarray(run.tensors[name]).tobytes() == np.asarray(parameter).tobytes(), name
    export_gguf(run, tmp_path / "run.gguf", "f32")
    from_gguf = open_model(tmp_path / "run.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    from_transformers = open_model(tmp_path / "theirs")
    for back in (from_gguf, from_transformers):
        assert set(back.tensors) == set(run.tensors)
        for name in run.tensors:
            assert np.asarray(back.tensors[name]).tobytes() == np.asarray(run.tensors[name]).tobytes(), name
    checks = certify(load(tmp_path / "run", "torch", "float32"), quiet)  # transformers, and llama.cpp where it is
    assert not [check for check in checks if check.passed is False], checks
    (by_transformers,) = (check for check in checks if check.name == "transformers equals Thinker")
    assert (by_transformers.passed, by_transformers.note) == (True, "Qwen3MoeForCausalLM")


def test_a_ramps_counters_and_beta2_follow_its_rows(text, tmp_path):
    """Bug: tokens are counted as if every batch were full, a small step is cut into empty parts, β2 stays put."""
    with repeatable(None):
        run = begin(ARCHITECTURE, settings(text, tmp_path / "run", ramp=4, accumulate=2), set(), quiet)
        seen, watcher = [], Silent()
        watcher.after_step = lambda run, report: seen.append(
            (report.tokens, run.optimizers[-1].param_groups[0]["betas"][1])
        )
        fit(run, watcher)
    assert [tokens // 32 for tokens, _ in seen] == [2, 2, 4, 4, 8, 8]
    assert run.tokens == 28 * 32
    for tokens, beta2 in seen:
        assert beta2 == run.settings.adam_beta2(tokens)
    assert json.loads((training.latest(run.folder) / "state.json").read_text())["tokens"] == run.tokens


@pytest.mark.slow
def test_a_compiled_ramp_resumes_bit_for_bit(text, tmp_path):
    """Bug: after a ramp the process that went through it has code for any shape, a resumed one for the last alone."""
    options = {"compile": "on", "precision": "bfloat16", "ramp": 4}
    whole, _ = train(text, tmp_path / "whole", **options)
    stopped = Silent()
    stopped.after_step = lambda run, report: run.step == 5 and os.kill(os.getpid(), signal.SIGINT)
    with repeatable(None):
        fit(begin(ARCHITECTURE, settings(text, tmp_path / "parts", **options), set(), quiet), stopped)
        torch.compiler.reset()  # as a new process would begin
        goes_on = resume(ARCHITECTURE, settings(text, tmp_path / "parts"), {"out"}, quiet)
        fit(goes_on, Silent())
    assert_same(weights(whole), weights(goes_on))
