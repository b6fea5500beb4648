"""The sampler against a plain reference: who is left, how often each is drawn, and on what a draw depends."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from thinker import sampling, sampling_kernels
from thinker.sampling import ONE, Draws, Sampling, draw_rows
from thinker.sampling_kernels import kth_largest, mass_before, mass_from, share_of

V = 40


def reference(logits, settings, seen=()):
    """Probabilities after Hugging Face's order of warpers, in so many words."""
    scores = logits.astype(np.float64).copy()
    for id in set(seen):
        scores[id] = (
            scores[id] / settings.repetition_penalty if scores[id] > 0 else scores[id] * settings.repetition_penalty
        )
    if not settings.temperature_last:
        scores = scores / settings.temperature
    alive = np.ones(len(scores), bool)
    if settings.top_k:
        alive &= scores >= np.sort(scores)[-settings.top_k]

    def probabilities():
        weights = np.where(alive, np.exp(scores - scores[alive].max()), 0)
        return weights / weights.sum()

    if settings.top_p < 1:
        order = np.argsort(-probabilities(), kind="stable")
        before = np.cumsum(probabilities()[order]) - probabilities()[order]
        alive[order[before >= settings.top_p]] = False
    if settings.min_p:
        alive &= probabilities() >= settings.min_p * probabilities().max()
    if settings.temperature_last:
        scores = scores / settings.temperature
    return probabilities()


def drawn(logits, settings, count, prompt=()):
    """`count` draws from the same logits, each as the first of its own request."""
    draws = Draws(1, len(logits))
    result = np.zeros(count, np.int64)
    for request in range(count):
        draws.begin(0, settings, request, prompt)
        result[request] = draws.draw([0], logits[None])[0]
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
        {"repetition_penalty": 1.8},
        {"temperature": 3.0, "top_p": 0.6, "temperature_last": True},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.3, "temperature_last": True},
        {"top_p": 0.05, "min_p": 0.9},
        {"top_k": 1},
        {"top_p": 1e-9},
    ],
)
def test_candidates_and_frequencies_are_the_references(options):
    """Bug: a filter in the wrong order, off by one candidate, or a draw that favours some of them."""
    settings = Sampling(**({"temperature": 1.0} | options))
    logits = np.random.default_rng(3).normal(0, 2, V).astype(np.float32)
    prompt = (1, 5, 9, 5)
    expected = reference(logits, settings, prompt if settings.repetition_penalty != 1 else ())
    count = 20_000
    frequency = np.bincount(drawn(logits, settings, count, prompt), minlength=V) / count
    assert set(np.nonzero(frequency)[0]) <= set(np.nonzero(expected)[0])
    # Five standard deviations of a binomial share: the seed is fixed, so this either holds or doesn't.
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


@pytest.mark.parametrize("equals", [False, True], ids=["apart", "with equals"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.95, 0.999, 1 - 1e-6])
def test_top_p_knows_who_is_in_among_thousands(share, equals):
    """Bug: a candidate's equals count all or not at all, or it counts itself."""
    draws = np.random.default_rng(5)
    weights = np.append(draws.integers(0, 3000, 4000) * (1 if equals else 99_991), ONE).astype(np.int32)
    wanted = share_of(share, mass_from(weights, weights, 1))
    within = [id for id, weight in enumerate(weights) if mass_before(weights, weights, weight, id)[1] < wanted]
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order], dtype=np.int64) - weights[order]
    needed = order[before < np.ceil(share * weights.sum(dtype=np.int64))]
    assert within == sorted(needed)


@pytest.mark.parametrize("share", [1e-6, 0.02, 0.5])
def test_top_p_among_equals(share):
    """Bug: a draw that is not the first ends among others, comes too often, or never comes to an end."""
    logits = np.concatenate([np.zeros(300), np.full(700, -3.0)]).astype(np.float32)
    among = max(1, round(share * (300 + 700 * math.exp(-3))))
    frequency = np.bincount(drawn(logits, Sampling(temperature=1.0, top_p=share), 4000), minlength=1000)
    assert frequency[among + 1 :].sum() == 0, "one more by rounding, at most"
    assert (np.abs(frequency[: among - 1] - 4000 / among) <= 5 * math.sqrt(4000 / among)).all()


def test_top_p_before_a_last_temperature_near_0_ends():
    """Bug: of two scores as good as equal top-p takes the first and the temperature the other: nobody can be drawn."""
    logits = np.full(50, -5, np.float32)
    logits[[3, 7]] = np.float32(0.01), np.nextafter(np.float32(0.01), np.float32(1))
    settings = Sampling(temperature=1e-12, top_p=1e-6, temperature_last=True)
    assert set(drawn(logits, settings, 20)) <= {3, 7}


@pytest.mark.parametrize("k", [1, 2, 50, 700, 3999, 4000])
@pytest.mark.parametrize("spread", [40, 3000, 1 << 30])
def test_top_k_finds_its_border_among_thousands(k, spread):
    """Bug: bisection forgets those it has left behind; or a candidate too many where none equals the k-th."""
    ranks = np.random.default_rng(6).integers(-spread, spread, 4000).astype(np.int32)
    least = kth_largest(ranks, ranks.max(), k, np.empty_like(ranks))
    kth = np.sort(ranks)[-k]
    assert (ranks >= least).sum() == (ranks >= kth).sum()


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id():
    """Bug: greedy depends on the seed, or on which of equal logits is met last."""
    logits = np.zeros(V, np.float32)
    logits[[7, 3, 30]] = 2.5
    assert set(drawn(logits, Sampling(temperature=0.0, seed=1), 50)) == {3}


def test_a_draw_depends_on_seed_request_and_index_alone():
    """Bug: the text of one request changes with its slot, its neighbours, or what was drawn before it."""
    logits = np.random.default_rng(0).normal(0, 1, (3, V)).astype(np.float32)
    settings = Sampling(temperature=1.0, seed=11)

    def text(slots, slot, rows):
        draws = Draws(slots, V)
        for other in range(slots):
            draws.begin(other, Sampling(temperature=1.0, seed=5), 90 + other)
        draws.begin(slot, settings, 4)
        written = []
        for row in rows:
            everyone = np.tile(logits[row][::-1], (slots, 1))
            everyone[slot] = logits[row]
            written.append(int(draws.draw(range(slots), everyone)[slot]))
        return written

    rows = [0, 1, 2, 1, 0, 2, 2, 1]
    assert text(1, 0, rows) == text(8, 5, rows) == text(3, 2, rows)
    draws = Draws(1, V)
    others = []
    for seed, request in ((11, 4), (12, 4), (11, 5)):
        draws.begin(0, Sampling(temperature=1.0, seed=seed), request)
        others.append([int(draws.draw([0], logits[row][None])[0]) for row in rows])
    assert others[0] == text(1, 0, rows)
    assert others[0] != others[1] != others[2] != others[0]


@pytest.mark.parametrize("slots", [[2], [-1], [1, 0, 2]])
def test_slots_that_there_are_not_are_refused(slots):
    """Bug: what was drawn for a slot outside of the table is written into memory that is another's."""
    with pytest.raises(ValueError, match=r"slots are .*: choose among 0 to 1"):
        Draws(2, V).draw(slots, np.zeros((len(slots), V), np.float32))


def test_a_kernel_is_made_anew_when_the_tables_change():
    """Bug: columns change places here, and the kernel that is kept on disk takes one setting for another."""
    assert {Path(sampling.__file__), Path(sampling_kernels.__file__)} <= set(draw_rows.sources)


def test_the_penalty_counts_the_prompt_unless_told_otherwise():
    """Bug: the option is ignored, or what was generated isn't counted either."""
    logits = np.zeros(V, np.float32)
    logits[4] = 1.0
    logits[5] = 0.9
    for penalize_prompt, first in ((True, 5), (False, 4)):
        draws = Draws(1, V)
        draws.begin(0, Sampling(repetition_penalty=2.0, penalize_prompt=penalize_prompt), 0, [4])
        assert int(draws.draw([0], logits[None])[0]) == first
    assert int(draws.draw([0], logits[None])[0]) == 5, "4 was generated, and counts now"


def test_impossible_logits():
    """Bug: -inf everywhere but one gives NaN; a large vocabulary overflows the whole-number weights."""
    logits = np.full(V, -np.inf, np.float32)
    logits[17] = -3.0
    for options in ({}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}):
        assert set(drawn(logits, Sampling(temperature=1.0, **options), 20)) == {17}
    flat = np.zeros(70_000, np.float32)
    ids = drawn(flat, Sampling(temperature=1.0), 300)
    assert ids.min() < 10_000
    assert ids.max() > 60_000
    assert len(set(ids)) > 250
    assert len(set(drawn(flat, Sampling(temperature=1.0, top_k=80_000), 50))) > 40, "more candidates than there are"


def test_without_a_compiler_the_draws_are_the_same(monkeypatch):
    """Bug: a text depends on whether something could be compiled, or there is none where nothing can."""
    rng, tokens = np.random.default_rng(0), set()
    for vocabulary in (1, 2, 40, 3000):
        for _ in range(150):
            logits = (rng.standard_normal((3, vocabulary)) * rng.choice([0.01, 1, 20])).astype(np.float32)
            if rng.random() < 0.5:
                logits = logits.round(1)  # equals, and zeros of either sign
            logits[0, rng.random(vocabulary) < 0.3] = rng.choice([-np.inf, np.nan])
            logits[0, 0] = 0
            settings = Sampling(
                temperature=rng.choice([0, 0.001, 0.7, 1, 5]),
                top_k=int(rng.choice([0, 1, 5, vocabulary])),
                top_p=rng.choice([0.001, 0.5, 0.95, 1]),
                min_p=rng.choice([0, 0.05, 1]),
                repetition_penalty=rng.choice([1, 1.3, 0.5]),
                temperature_last=bool(rng.integers(2)),
                seed=int(rng.integers(1 << 63)),
            )
            both = []
            for compiled in (True, False):
                monkeypatch.setattr(sampling, "is_compiled", lambda compiled=compiled: compiled)
                draws = Draws(3, vocabulary)
                for slot in range(3):
                    draws.begin(slot, settings, slot, [0, vocabulary // 2])
                drawn = [draws.draw([2, 0, 1], logits).tolist() for _ in range(4)]
                both.append((drawn, draws.keys.tolist(), draws.seen.tobytes()))
            assert both[0] == both[1], settings
            tokens |= {token for drawn in both[0][0] for token in drawn}
    assert len(tokens) > 500
    for impossible in (np.nan, -np.inf, np.inf):
        with pytest.raises(ValueError, match="no finite number"):
            Draws(1, V).draw([0], np.full((1, V), impossible, np.float32))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("infinite", [[17], range(V)])
def test_an_infinite_logit_is_refused(options, infinite):
    """Bug: where nothing has a probability the last token is drawn, and top-p looks on before the first, till the
    process dies."""
    logits = np.zeros(V, np.float32)
    logits[infinite] = np.inf
    with pytest.raises(ValueError, match="no finite number or an infinite one"):
        drawn(logits, Sampling(**options), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_settings_that_mean_nothing_are_named(field, value):
    """Bug: a typing error samples nonsense in silence."""
    with pytest.raises(ValueError, match=rf"^{field} is .*: choose"):
        Sampling(**{field: value})
