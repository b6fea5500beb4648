"""What a run's memory is made of, and the settings that take less of it."""

import pytest

from thinker.checkpoint.publish import Publication
from thinker.config import ThinkerConfig
from thinker.moe import SPACING
from thinker.train import estimate
from thinker.train.config import TrainConfig
from thinker.train.decide import Decisions
from thinker.train.estimate import PROGRAMS, Plan, changes, programs, remedies
from thinker.train.rehearsal import Rehearsal

CONFIG = ThinkerConfig(ctx_len=128, use_moe=True)


def tried(**fields):
    """All remedies, as flags."""
    settings = TrainConfig(**fields)
    return [changes(CONFIG, settings, *remedy) for remedy in remedies(CONFIG, settings)]


def test_remedies_come_in_order_and_keep_the_rows_of_a_step():
    """Bug: context is given up before the batch, or a step's tokens change with the batch."""
    assert tried(batch_size=4, accumulate=3) == [
        "--batch-size 2 --accumulate 6",
        "--batch-size 1 --accumulate 12",
        "--batch-size 1 --accumulate 12 --checkpoint-activations",
        "--batch-size 1 --accumulate 12 --checkpoint-activations --ctx-len 64",
        "--batch-size 1 --accumulate 12 --checkpoint-activations --ctx-len 32",
    ]


def test_a_share_of_texts_is_kept_in_a_rehearsal(monkeypatch):
    """Bug: fewer batches are rehearsed, of whose rows texts would get none, and the settings are refused."""
    rehearsed = []
    monkeypatch.setattr(Plan, "run", lambda plan, config, settings, decisions: rehearsed.append(settings))
    monkeypatch.setattr(estimate, "rehearse", lambda make, accelerator: make())
    plan = Plan(None, Publication(), Decisions("cuda", "bfloat16", False, 1, 1.0, (), {}))
    for text in (("poems",), ()):
        settings = TrainConfig(chat=True, text=text, text_share=0.2, batch_size=1, accumulate=8)
        plan.estimate(CONFIG, settings)
    assert [(settings.text_rows, settings.accumulate) for settings in rehearsed] == [(2, 8), (0, 2)]


@pytest.mark.parametrize(
    ("rows", "first"), [(9, "--batch-size 3 --accumulate 3"), (7, "--batch-size 1 --accumulate 7")]
)
def test_odd_rows_are_divided_evenly(rows, first):
    """Bug: 9 rows become twice 4."""
    assert tried(batch_size=rows)[0] == first


def test_what_recomputes_already_is_not_told_to():
    """Bug: a remedy without any change, rehearsed for nothing."""
    assert tried(batch_size=1, checkpoint_activations=True) == ["--ctx-len 64", "--ctx-len 32"]


def test_programs_of_a_mixture_grow_with_the_steps_to_their_bound():
    """Bug: what oneDNN gathers over the steps of a mixture in bfloat16 is left out, or counted without end."""
    rehearsal = Rehearsal(whole={}, at_peak={}, held=0, rest=0, products=50, grouped=6)
    few = programs(rehearsal, CONFIG, TrainConfig(steps=2, batch_size=8))
    assert few == 50 + 6 * 8 * CONFIG.ctx_len * 2 // SPACING  # sizes that a group can have
    assert programs(rehearsal, CONFIG.changed(n_layers=1, num_experts=2), TrainConfig(steps=2)) == 50 + 6 * 2 * 3
    assert programs(rehearsal, CONFIG.changed(ctx_len=2048), TrainConfig(steps=1000)) == PROGRAMS
    assert programs(rehearsal, CONFIG.changed(ctx_len=2048), TrainConfig(minutes=1)) == PROGRAMS
