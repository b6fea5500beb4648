"""An embedding and a head to begin with: from which tokens follow which in the text, counted before the first step.

What a token means shows in its neighbours, and a table of them can be factored into vectors (Levy and Goldberg 2014,
"Neural Word Embedding as Implicit Matrix Factorization"), which a network would otherwise take steps to find. What that
is worth is in `benchmarks/learning/RESULTS.md`. Nothing in the network tells afterwards that it began so.
"""

# N tokens, V vocabulary, D d_model, P pairs that occur

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import ThinkerLM

MOST_TOKENS = 1 << 22  # that are counted of a longer text, which takes some seconds
PIECE = 1 << 18  # of them at a time
PRIOR = 10.0  # occurrences by chance that every pair has beforehand, so that what was seen once proves little
ITERATIONS = 2  # of the power method: two more took the standard library's relative error from 0.631 to 0.623
EMBEDDING, HEAD = 0.04, 0.14  # root mean squares, of each row and of all: what the sweeps found


def begin_from_neighbours(model: ThinkerLM, tokens: np.ndarray, reach: int) -> None:
    """Set embedding and head by the pairs of tokens at most `reach` apart in (N,) ids; tied ones by both orders."""
    config = model.config
    pairs, counts = count(tokens, config.vocab_size, reach)
    if config.tie_embeddings:
        a, b = np.divmod(pairs, config.vocab_size)
        pairs, counts = _added(np.concatenate([pairs, b * config.vocab_size + a]), np.concatenate([counts, counts]))
    before, after = factors(surprises(pairs, counts, config.vocab_size), config.d_model)
    begins = torch.from_numpy(np.bincount(pairs // config.vocab_size, minlength=config.vocab_size) > 0)
    with torch.no_grad():
        rows = F.normalize(before, dim=1) * EMBEDDING * config.d_model**0.5
        model.tok_emb.weight[begins] = rows[begins].to(model.tok_emb.weight)  # what doesn't occur stays random
        if not config.tie_embeddings:
            model.head.weight.copy_(after / after.square().mean().sqrt() * HEAD)


def count(tokens: np.ndarray, vocab_size: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a token and one behind it, and how often they occur, a pair as 1 / distance: two arrays (P,).

    A pair is first × vocab_size + second. Of a text longer than `MOST_TOKENS`, pieces from all over it are counted.
    """
    size = min(PIECE, len(tokens))
    pieces = -(-min(len(tokens), MOST_TOKENS) // size)
    pairs, counts = np.zeros(0, np.int64), np.zeros(0)
    for start in np.linspace(0, len(tokens) - size, pieces).astype(np.int64).tolist():
        piece = tokens[start : start + size].astype(np.int64)
        for distance in range(1, reach + 1):
            new = piece[:-distance] * vocab_size + piece[distance:]
            weights = np.full(len(new), 1 / distance)
            pairs, counts = _added(np.concatenate([pairs, new]), np.concatenate([counts, weights]))
    return pairs, counts


def _added(pairs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair once, with its counts added up."""
    found, which = np.unique(pairs, return_inverse=True)
    return found, np.bincount(which, counts)


def surprises(pairs: np.ndarray, counts: np.ndarray, vocab_size: int) -> Tensor:
    """How much oftener b follows a than chance has it: sparse (V, V), log(1 + count / (PRIOR × share of b)).

    Divided by the count of a as well, every logit after a would be lower by the same, which is why it isn't.
    """
    a, b = np.divmod(pairs, vocab_size)
    share = np.bincount(b, counts, vocab_size) + 1
    values = np.log1p(counts / (PRIOR * share[b] / share.sum()))
    places = torch.from_numpy(np.stack([a, b]))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(values).float(), (vocab_size, vocab_size), is_coalesced=True, check_invariants=False
    )


def factors(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Two matrices (V, D) whose product, the second transposed, is nearest to a sparse one (V, V), randomly turned."""
    rank = min(width, len(matrix))
    left, values, right = torch.svd_lowrank(matrix, rank, niter=ITERATIONS)
    turn = torch.linalg.qr(torch.randn(width, width))[0][:rank]  # so that no dimension matters more than others
    return (left * values.sqrt()) @ turn, (right * values.sqrt()) @ turn
