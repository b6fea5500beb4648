"""The rehearsal: every tensor of the true step counted, none of them made."""

import numpy as np
import pytest
import torch

from thinker.compiled.processor import TILES
from thinker.config import ThinkerConfig
from thinker.data.batches import Batches
from thinker.fused import kernels
from thinker.model import ThinkerLM
from thinker.train.allocator import resident
from thinker.train.config import TrainConfig
from thinker.train.decide import Decisions, repeatable
from thinker.train.rehearsal import rehearse
from thinker.train.start import assemble

SHAPE = ThinkerConfig(vocab_size=300, n_layers=4, d_model=256, n_heads=4, d_ff=512, ctx_len=512)


def rehearsed(config=SHAPE, compile=False, precision="float32", accelerator=False, **fields):
    settings = TrainConfig(**{"precision": precision, "batch_size": 4} | fields)
    decisions = Decisions("cpu", precision, compile, 1, 0.0, (), {})

    def make():
        rows = settings.batch_size * settings.accumulate
        batches = Batches(np.zeros(20_000, np.uint16), rows, config.ctx_len, 0)
        return assemble(None, config, settings, decisions, None, ThinkerLM(config), batches, None)

    return rehearse(make, accelerator=accelerator)


def test_parts_are_counted_and_nothing_is_made():
    """Bug: a rehearsal takes the memory that it should foretell, or gradients and state of the optimiser are missed."""
    rehearsed(batch_size=1)  # imports what it needs
    before = resident()
    found = rehearsed()
    grown = resident() - before
    count = 4 * SHAPE.parameter_count()
    assert count <= found.whole["weights"] <= count + 2 * 4 * 512 * 32
    assert found.whole["gradients"] == count
    assert found.whole["optimiser"] > count  # Muon's momentum, AdamW's two moments of the rest, and what works on them
    assert found.peak > found.whole["activations"] > 100 << 20
    assert grown < found.peak / 5


@pytest.mark.slow
def test_less_is_counted_where_less_is_needed(monkeypatch):
    """Bug: recomputing, fewer rows, or one kernel for attention make no difference to the estimate."""
    precision = str(kernels.numbers()).removeprefix("torch.")
    ours = rehearsed(precision=precision, batch_size=1)
    monkeypatch.setattr(kernels, "is_available", lambda dtype: False)
    plain = rehearsed(precision=precision, batch_size=1)
    if kernels.multiplies(kernels.numbers()):
        assert ours.whole["activations"] < 0.9 * plain.whole["activations"]
    whole = rehearsed()
    assert rehearsed(checkpoint_activations=True).whole["activations"] < 0.7 * whole.whole["activations"]
    assert rehearsed(batch_size=2).whole["activations"] < 0.6 * whole.whole["activations"]
    assert rehearsed(accelerator=True).whole["activations"] < whole.whole["activations"]
    assert rehearsed(compile=True).whole["activations"] < whole.whole["activations"]
    assert rehearsed(precision="bfloat16").whole["activations"] < 0.9 * whole.whole["activations"]


def test_the_second_batch_of_a_step_meets_the_gradients_of_the_first():
    """Bug: with accumulation, gradients and activations are never counted together."""
    assert rehearsed(accumulate=2).at_peak["gradients"] > 0
    assert rehearsed().at_peak.get("gradients", 0) == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_for_which_onednn_keeps_programs(precision):
    """Bug: products of narrow types are not seen, or those in float32 counted, which another library computes."""
    config = ThinkerConfig(vocab_size=300, n_layers=2, d_model=128, n_heads=2, d_ff=256, ctx_len=256, use_moe=True)
    found = rehearsed(config, precision=precision)
    # Into the hidden layer and out of it, each with two gradients; by tiles weights' are no such products.
    by_tiles = TILES and kernels.multiplies(torch.bfloat16)
    assert found.grouped == ((4 if by_tiles else 6) if precision == "bfloat16" else 0)
    assert (found.products > 10) == (precision == "bfloat16")


@pytest.mark.skipif(not kernels.multiplies(kernels.numbers()), reason="there are no kernels for this processor")
def test_what_threads_need_for_themselves_is_counted():
    """Bug: attention's own memory, 14 MB a thread at 2,048 tokens of 128, is missing where there are many threads."""
    config = SHAPE.changed(n_layers=1, d_model=64, n_heads=4, head_dim=128, d_ff=64, ctx_len=2048)
    precision = str(kernels.numbers()).removeprefix("torch.")
    counted = []
    for threads in (1, 8, 64):
        with repeatable(threads):
            counted.append(rehearsed(config, precision=precision, batch_size=2).whole["activations"])
    one, eight, more = counted
    assert one + (40 << 20) < eight == more  # two rows of four heads have work for eight
