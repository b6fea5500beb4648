"""The embedding and the head that a new model begins with."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from thinker.config import ThinkerConfig
from thinker.model import ThinkerLM
from thinker.train import cooccurrence
from thinker.train.config import TrainConfig
from thinker.train.cooccurrence import begin_from_neighbours, count, factors, surprises

V = 60


def some_text(length: int = 4000) -> np.ndarray:
    """Sentences of three tokens: one of 10 to 19, one of 20 to 29 that goes with it, and one of 30 to 59."""
    rng = np.random.default_rng(0)
    first = rng.integers(10, 20, length)
    return np.stack([first, 20 + first % 5 + 5 * rng.integers(0, 2, length), rng.integers(30, 60, length)], 1).ravel()


def model(**fields) -> ThinkerLM:
    torch.manual_seed(0)
    return ThinkerLM(
        ThinkerConfig(vocab_size=V, d_model=32, n_heads=2, n_layers=1, d_ff=32, ctx_len=64, **fields)
    ).eval()


@pytest.mark.parametrize("piece", [1 << 18, 50])
def test_pairs_are_counted_by_their_distance(piece, monkeypatch):
    """Bug: a pair's order is lost, its distance doesn't count, or pieces after the first are left out."""
    monkeypatch.setattr(cooccurrence, "PIECE", piece)
    tokens = some_text(50)
    expected: Counter[int] = Counter()
    for start in range(0, len(tokens), piece):
        part = tokens[start : start + piece].tolist()
        for distance in (1, 2, 3):
            for a, b in zip(part, part[distance:], strict=False):
                expected[a * V + b] += 1 / distance
    pairs, counts = count(tokens.astype(np.uint16), V, 3)
    assert pairs.tolist() == sorted(expected)
    np.testing.assert_allclose(counts, [expected[pair] for pair in sorted(expected)])


def test_of_a_long_text_pieces_from_all_over_it_are_counted(monkeypatch):
    """Bug: only the beginning of a long text counts, or all of it."""
    monkeypatch.setattr(cooccurrence, "PIECE", 10)
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 30)
    pairs, counts = count(np.arange(55) % V, V, 1)
    begun = sorted({pair // V for pair in pairs.tolist()})
    assert (min(begun), max(begun), counts.sum()) == (0, 53, 27)


def test_what_is_factored_says_how_much_oftener_than_chance():
    """Bug: rows and columns in each other's place, or a prior that a frequent token has and a rare one hasn't."""
    dense = surprises(np.array([0 * 3 + 1, 1 * 3 + 2]), np.array([6.0, 2.0]), 3).to_dense()
    shares = np.array([1, 7, 3]) / 11
    expected = np.zeros((3, 3))
    expected[0, 1], expected[1, 2] = np.log1p(6 / (10 * shares[1])), np.log1p(2 / (10 * shares[2]))
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-6)


def test_factors_give_the_matrix_back():
    """Bug: the two sides are turned differently, or a small vocabulary has no room in a wide model."""
    torch.manual_seed(0)
    matrix = (torch.rand(V, 4) @ torch.rand(4, V)).to_sparse()
    for width in (8, V + 4):
        left, right = factors(matrix, width)
        assert left.shape == right.shape == (V, width)
        torch.testing.assert_close(left @ right.T, matrix.to_dense(), atol=1e-4, rtol=1e-4)


def test_a_model_begins_with_what_follows_what():
    """Bug: embedding and head change places, or what was counted doesn't reach the model."""
    text, new = some_text(), model()
    begin_from_neighbours(new, text, 3)
    logits = new(torch.arange(V)[None])[0]  # blocks begin as the identity
    for first in range(10, 20):
        assert {20 + first % 5, 25 + first % 5} == set(logits[first].topk(2).indices.tolist())
    again = model()
    begin_from_neighbours(again, text, 3)
    assert torch.equal(again.head.weight, new.head.weight)


def test_one_matrix_has_tokens_of_the_same_company_near_each_other():
    """Bug: a tied embedding that knows only what comes behind."""
    new = model(tie_embeddings=True)
    begin_from_neighbours(new, some_text(), 1)
    rows = F.normalize(new.tok_emb.weight.detach(), dim=1)
    near = rows @ rows.T
    for second in range(20, 25):
        others = [token for token in range(20, 30) if token % 5 != second % 5]
        assert near[second, second + 5] > near[second, others].max() + 0.3


@pytest.mark.parametrize("other", [{"chat": True}, {"init": "runs/demo"}])
def test_it_is_for_new_models_of_texts(other):
    """Bug: a trained embedding is written over."""
    with pytest.raises(ValueError, match=f"cooccurrence 3 is for new models of texts: .* or {next(iter(other))}"):
        TrainConfig(cooccurrence=3, **other)


def test_a_token_that_does_not_occur_begins_as_it_would_have():
    """Bug: turns of a conversation, which no text holds, all begin as the same row of zeros."""
    new, usual = model(), model()
    begin_from_neighbours(new, some_text(), 3)
    assert torch.equal(new.tok_emb.weight[:10], usual.tok_emb.weight[:10])
    assert (new.tok_emb.weight[10:].square().mean(dim=1).sqrt() - 0.04).abs().max() < 1e-5
