"""Decisions about the machine: recorded, reused, and never left behind in the process."""

import contextlib
import shutil

import pytest
import torch

from thinker.config import ThinkerConfig
from thinker.loss import NextTokenLoss
from thinker.model import ThinkerLM
from thinker.train import decide as room
from thinker.train.config import TrainConfig
from thinker.train.decide import Decisions, choose_device, decide, dropout_seed, repeatable
from thinker.train.start import expected_steps

CONFIG = ThinkerConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2, d_ff=32, ctx_len=16)


def one_row():
    return torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_precision_is_what_the_probe_found_faster(monkeypatch, faster):
    """Bug: bfloat16 is taken on a processor where it is twice as slow."""
    monkeypatch.setattr(room, "SLOW_PAIRS", False)
    monkeypatch.setattr(room, "bfloat16_cost", lambda: 0.5)
    monkeypatch.setattr(room, "probe", lambda module, batch, device, name: 1.0 if name == faster else 2.0)
    decisions = decide(TrainConfig(steps=10), NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu")
    assert decisions.precision == faster
    assert decisions.seconds_per_step == 8.0  # eight rows
    assert any(faster in reason and "faster" in reason for reason in decisions.reasons)


def test_what_a_processor_emulates_is_not_probed(monkeypatch):
    """Bug: a processor without bfloat16 takes half a minute to find out that it is ten times as slow."""
    monkeypatch.setattr(room, "bfloat16_cost", lambda: 6.9)
    probed = []
    monkeypatch.setattr(room, "probe", lambda module, batch, device, name: probed.append(name) or 1.0)
    decisions = decide(TrainConfig(steps=10), NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu")
    assert probed == ["float32"]
    assert decisions.precision == "float32"
    assert decisions.reasons[0] == "float32: a product takes 6.9 times as long in bfloat16 here"


def test_what_is_known_to_be_slow_is_not_timed(monkeypatch):
    """Bug: products that take twice as long, or not quite, as that is timed: one precision today, another tomorrow."""
    monkeypatch.setattr(room, "bfloat16_cost", lambda: 1.4)
    for slow in (False, True):
        monkeypatch.setattr(room, "SLOW_PAIRS", slow)
        assert room.worth_probing() == (("float32",) if slow else ("float32", "bfloat16"))


def test_what_kernels_there_are_is_said(monkeypatch):
    """Bug: a run is slow because Numba is broken, and nobody learns of it."""
    monkeypatch.setattr(room, "probe", lambda module, batch, device, name: 1.0)
    monkeypatch.setattr(room.kernels, "multiplies", lambda dtype: True)
    monkeypatch.setattr(room.kernels, "numbers", lambda: torch.bfloat16)
    monkeypatch.setattr(room, "NEGLECTED", False)
    settings = TrainConfig(steps=10, precision="bfloat16")
    config = CONFIG.changed(d_model=64, n_heads=2)
    ours, compiled = "Thinker's own for attention (products by", settings.model_copy(update={"compile": "on"})
    for hindrance, run, said in (
        (None, settings, "tiles), norms, weights' gradients, activations and the loss"),
        (None, compiled, "tiles), weights' gradients, activations and the loss"),
        ("OSError: no room", settings, "torch's alone, for want of Thinker's own (OSError: no room)"),
    ):
        monkeypatch.setattr(room.kernels, "hindrance", lambda dtype, why=hindrance: why)
        monkeypatch.setattr(room.kernels, "form", lambda why=hindrance: "none" if why else "tiles")
        monkeypatch.setattr(room.kernels, "is_available", lambda dtype, why=hindrance: why is None)
        decisions = decide(run, NextTokenLoss(ThinkerLM(config)), one_row(), "cpu")
        (reason,) = (reason for reason in decisions.reasons if reason.startswith("kernels: "))
        assert reason.endswith(said)
        assert (ours in reason) == (hindrance is None)


def test_kernels_are_said_to_be_ours_where_they_are(monkeypatch):
    """Bug: a run's record says that torch's library did what we did, or the other way round."""
    monkeypatch.setattr(room.kernels, "hindrance", lambda dtype: None)
    monkeypatch.setattr(room.kernels, "form", lambda: "none")
    odd, plain = (
        CONFIG.changed(d_model=72, n_heads=2, d_ff=100),
        CONFIG.changed(d_model=64, use_swiglu=False, n_heads=2),
    )
    for neglected, config, said in (
        (True, ThinkerConfig(), "attention, norms, products, activations and the loss"),
        (False, ThinkerConfig(), "attention, norms, activations and the loss"),
        (True, odd, "products and the loss"),
        (False, plain, "attention, norms and the loss"),
    ):
        monkeypatch.setattr(room, "NEGLECTED", neglected)
        assert room.own_kernels(config, compiled=False) == f"kernels: Thinker's own for {said}"
    assert "norms" not in room.own_kernels(ThinkerConfig(), compiled=True)


def test_probing_changes_no_parameter_and_draws_nothing():
    """Bug: the probe's gradients, an update or its dropout's draws leak into the run, which depends on the probe."""
    model = ThinkerLM(CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    decide(TrainConfig(steps=10), NextTokenLoss(model), one_row(), "cpu")
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_probe_waits_for_the_accelerator_that_it_times(monkeypatch, device):
    """Bug: the first accelerator is waited for where the run has another one, and its steps seem to take no time."""
    awaited = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: awaited.append(device))
    room.probe(NextTokenLoss(ThinkerLM(CONFIG)), one_row(), device, "float32")
    assert awaited == [device] * 2


@pytest.mark.parametrize(
    ("device", "able", "precision"),
    [("cuda", True, "bfloat16"), ("cuda", False, "float16"), ("mps", False, "bfloat16")],
)
def test_older_cuda_devices_alone_train_in_float16(monkeypatch, device, able, precision):
    """Bug: whatever isn't CUDA is asked whether CUDA knows bfloat16, and trains in float16, with a scaled loss."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    monkeypatch.setattr(room, "probe", lambda *_: 0.01)
    run = TrainConfig(steps=10, compile="off")
    assert decide(run, NextTokenLoss(ThinkerLM(CONFIG)), one_row(), device).precision == precision


@pytest.mark.parametrize(("seconds", "steps", "compiled"), [(1.0, 10, False), (1.0, 1000, True), (0.001, 1000, False)])
def test_compiling_is_chosen_where_the_run_repays_it(monkeypatch, seconds, steps, compiled):
    """Bug: a run of ten seconds compiles for half a minute."""
    monkeypatch.setattr(room, "probe", lambda *_: seconds / 8)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(room.kernels, "is_available", lambda dtype: False)
    run = TrainConfig(steps=steps, precision="float32")
    assert decide(run, NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu").compile is compiled


@pytest.mark.parametrize(
    ("precision", "seconds", "there", "compiled"),
    [
        ("bfloat16", 150, False, True),
        ("bfloat16", 150, True, False),
        ("bfloat16", 250, True, True),
        ("float32", 150, False, True),
        ("float32", 500, True, False),
        ("float32", 700, True, True),
    ],
)
def test_compiling_must_repay_more_beside_kernels(monkeypatch, precision, seconds, there, compiled):
    """Bug: a compiler is waited for that saves less than it takes, or never taken where there are kernels."""
    monkeypatch.setattr(room, "probe", lambda *_: seconds / 1000 / 8)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(room.kernels, "multiplies", lambda dtype: precision == "float32" or dtype == torch.bfloat16)
    monkeypatch.setattr(room.kernels, "numbers", lambda: getattr(torch, precision))
    monkeypatch.setattr(room.kernels, "is_available", lambda dtype: there)
    run = TrainConfig(steps=1000, precision=precision)
    assert decide(run, NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu").compile is compiled


@pytest.mark.parametrize(
    ("precision", "there", "compiled", "steps"),
    [
        ("bfloat16", False, "on", 1500),
        ("bfloat16", True, "on", 1143),
        ("float32", True, "on", 1064),
        ("float32", True, "off", 1000),
    ],
)
def test_a_run_of_minutes_expects_the_steps_that_it_can_do(monkeypatch, precision, there, compiled, steps):
    """Bug: half as many steps again are expected where there are kernels, and the text is taken to repeat."""
    monkeypatch.setattr(room, "probe", lambda *_: 0.06 / 8)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(room.kernels, "multiplies", lambda dtype: True)
    monkeypatch.setattr(room.kernels, "numbers", lambda: getattr(torch, precision))
    monkeypatch.setattr(room.kernels, "hindrance", lambda dtype: None if there else "OSError: no room")
    monkeypatch.setattr(room.kernels, "is_available", lambda dtype: there)
    run = TrainConfig(minutes=1, precision=precision, compile=compiled)
    decisions = decide(run, NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu")
    assert round(expected_steps(run, decisions)) == steps


def test_without_a_compiler_auto_does_without_and_on_says_what_is_missing(monkeypatch):
    """Bug: torch's own traceback, an hour into the night."""
    monkeypatch.setattr(room, "probe", lambda *_: 1.0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    module = NextTokenLoss(ThinkerLM(CONFIG))
    assert not decide(TrainConfig(steps=10_000, precision="float32"), module, one_row(), "cpu").compile
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        decide(TrainConfig(steps=10, precision="float32", compile="on"), module, one_row(), "cpu")


def test_decisions_survive_json():
    """Bug: a resumed run decides anew and is no longer bit for bit the same."""
    decisions = decide(TrainConfig(steps=3), NextTokenLoss(ThinkerLM(CONFIG)), one_row(), "cpu")
    assert Decisions.from_json(decisions.to_json()) == decisions
    assert decisions.versions["torch"] == torch.__version__


def test_a_device_that_is_not_there_gets_one_line():
    """Bug: a traceback from deep inside torch."""
    with pytest.raises(ValueError, match=r"device is 'nonsense'.*choose cpu") as caught:
        choose_device("nonsense")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="device is 'meta'"):
        choose_device("meta")
    assert choose_device("cpu") == choose_device("cpu:0") == "cpu"


def test_determinism_ends_with_the_run():
    """Bug: a library call leaves the whole process in deterministic mode, or on one thread."""
    threads = torch.get_num_threads()
    with repeatable(1):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads


def test_dropout_seeds_differ_in_every_coordinate():
    """Bug: seed and step are added, so that step 1 of seed 0 repeats step 0 of seed 1."""
    seeds = {
        dropout_seed(seed, step, micro, rank)
        for seed in range(3)
        for step in range(3)
        for micro in range(3)
        for rank in range(3)
    }
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
