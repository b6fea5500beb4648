"""The yardsticks of learning: the other network is what it claims to be, and both sides get the same tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.learning import bits, nanogpt, repeated, sweeps
from benchmarks.learning.gpt2 import GPT2
from benchmarks.learning.runs import Look, Text, held_out, train
from thinker.loss import NextTokenLoss
from thinker.train.decide import repeatable

SMALL = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "ctx_len": 8}


@pytest.fixture(scope="module")
def text() -> Text:
    draws = np.random.default_rng(0)
    return Text(*(draws.integers(0, 65, size).astype(np.uint16) for size in (40_000, 1001)))


def test_both_networks_have_the_size_of_nanogpts(text: Text) -> None:
    """Bug: a larger model wins."""
    sizes = [
        sum(p.numel() for p in run.model.parameters()) for run in (nanogpt.nanogpt(text, 0), nanogpt.ours(text, 0))
    ]
    # 4 blocks of 12 d², norms without biases, tied embeddings, positions
    assert sizes[0] == 4 * 12 * 128**2 + 9 * 128 + 65 * 128 + 64 * 128
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_both_sides_see_as_many_characters(text: Text) -> None:
    """Bug: a recipe that has seen more text wins."""
    runs = [nanogpt.nanogpt(text, 0), nanogpt.ours(text, 0)]
    assert {run.settings.steps * run.batches.tokens_per_batch for run in runs} == {2000 * 12 * 64}
    for name in sweeps.CHANGES:
        run = sweeps.variant(text, 0, 125, name)
        seen = run.batches.epochs(run.settings.steps) * run.batches.windows_per_epoch * 64
        assert seen == pytest.approx(125 * 24 * 64, rel=0.02), name


def test_the_other_network_is_causal_and_begins_as_it_should(text: Text) -> None:
    """Bug: a position that sees what it shall predict, or weights drawn too large for it to learn."""
    torch.manual_seed(0)
    model = GPT2(nanogpt.nanogpt(text, 0).config)
    tokens = torch.randint(0, 65, (2, 64))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 65
    with torch.no_grad():
        before, after = model.features(tokens)[0], model.features(changed)[0]
        loss = NextTokenLoss(model)(tokens, tokens.roll(-1, 1)).total / tokens.numel()
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])
    assert float(loss) == pytest.approx(np.log(65), abs=0.1)
    assert float(model.layers[0].mlp_out.weight.detach().std()) == pytest.approx(0.02 / np.sqrt(8), rel=0.05)


def test_nanogpts_settings_are_those_that_train_it(text: Text) -> None:
    """Bug: the loop sets our β2, or decay leaves out the embedding."""
    run = nanogpt.nanogpt(text, 0)
    assert run.settings.adam_beta2(12 * 64) == 0.99
    (optimizer,) = run.optimizers
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in run.model.parameters() if p.dim() == 2}


def test_a_run_is_looked_at_and_measured_whole_at_its_end(text: Text) -> None:
    """Bug: the loss that is reported is of a part of the held-out text, or of an earlier step."""
    with repeatable(None):
        run = nanogpt.ours(text, 0, steps=10, compiled=False, batch_size=2, **SMALL)
        assert held_out(run) == pytest.approx(np.log(65), rel=1e-5), "a zero head guesses uniformly"
        done = train(run, "test", looks=5)
        assert done.loss == held_out(run) != held_out(run, every=8)
    assert [look.step for look in done.looks] == [2, 4, 6, 8, 10]
    assert [look.tokens for look in done.looks] == [32, 64, 96, 128, 160]
    assert done.to_json()["looks"][-1]["loss"] == done.loss


def test_the_best_state_is_what_counts_where_it_is_kept(text: Text) -> None:
    """Bug: the last state is measured, or the best one's loss on a part of the text is reported as that of all."""
    with repeatable(None):
        little = Text(text.train[:40], text.valid)  # learned by heart, which is no help on the rest
        run = nanogpt.ours(little, 0, steps=100, compiled=False, batch_size=2, **SMALL)
        done = train(run, "test", looks=5, sparse=4, keep_best=True)
        assert done.loss == held_out(run)
        along = [look.loss for look in done.looks[:-1]]
        assert done.state_of == done.looks[int(np.argmin(along))].step < 100
        assert held_out(run, every=4) == min(along)


def test_an_early_stop_is_read_from_a_runs_looks() -> None:
    """Bug: a stop that sees what comes after it."""
    looks = [3.0, 2.0, 2.5, 2.2, 1.0, 4.0]
    assert sweeps.stopped(looks, 1) == (2.0, 3 / 6)
    assert sweeps.stopped(looks, 2) == (2.0, 4 / 6)
    assert sweeps.stopped(looks, 3) == (1.0, 1.0)


def test_tables_of_what_is_committed() -> None:
    """Bug: results that the scripts can no longer read, or a table that takes one text's runs for another's."""
    for module in (nanogpt, bits, sweeps, repeated):
        table = module.table(json.loads(module.RESULTS.read_text()))
        assert len(table.splitlines()) > 2
    look = Look(1, 2, 3.0, 4.0)
    runs = [
        {"name": name, "data": data, "share": 1, "looks": [{"tokens": look.tokens}], "bits_per_byte": [value]}
        for name, data, value in (
            (bits.OURS, "x", 1.5),
            (bits.OURS, "x", 2.5),
            (f"{bits.ADAMW}: lr 1", "x", 2.5),
            (f"{bits.ADAMW}: lr 2", "x", 4.0),
            (bits.LLAMA, "x", 4.0),
            (bits.OURS, "y", 9.0),
        )
    ]
    rows = [line.split("|")[-4:-1] for line in bits.table({"runs": runs}).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["4.000", "+60.0%", "+0.0%"],
        ["2.500", "+0.0%", "-37.5%"],
        ["4.000", "+60.0%", "+0.0%"],
        ["2.000 ± 0.707", "-20.0%", "-50.0%"],
        ["9.000", "", ""],
    ]
