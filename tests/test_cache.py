"""Cached equals uncached, however the sequence is cut: the proof that cached decoding computes the same network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ids, padded
from torch import Tensor

from thinker.cache import KVCache
from thinker.config import ThinkerConfig
from thinker.model import ThinkerLM

Build = Callable[..., ThinkerLM]

SPLITS = [[20], [1] * 20, [19, 1], [1, 19], [7, 1, 1, 11], [3, 5, 4, 8]]


def empty(model: ThinkerLM, rows: int) -> KVCache:
    return KVCache.empty(model.config, rows, device=torch.device("cpu"), dtype=model.head.weight.dtype)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["ids", "embeddings", "both"])
def test_cached_equals_uncached(config: ThinkerConfig, build: Build, inputs: str) -> None:
    """Catches decoding that attends to position 0 alone, a chunk that sees its own future, positions that restart."""
    model, tokens = build(config), ids(2, 20)
    wanted = model(tokens)
    for split in SPLITS:
        logits, kv_cache = [], None
        for part, chunk in enumerate(tokens.split(split, dim=1)):
            if inputs == "ids" or (inputs == "both" and part % 2):
                some, kv_cache = model(chunk, kv_cache=kv_cache, use_cache=True)
            else:
                some, kv_cache = model(embeddings=model.tok_emb(chunk), kv_cache=kv_cache, use_cache=True)
            logits.append(some)
        torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-12)
        assert kv_cache.lengths == [20, 20]


@settings(max_examples=25)
@given(split=st.lists(st.integers(1, 9), min_size=1, max_size=10))
def test_cached_equals_uncached_for_any_split(split: list[int]) -> None:
    """Catches a split that nobody thought of."""
    from conftest import randomise, small

    model = randomise(ThinkerLM(small("gqa_qk_norm", ctx_len=90, n_layers=2)).double())
    tokens, logits, kv_cache = ids(1, sum(split)), [], None
    with torch.no_grad():
        for chunk in tokens.split(split, dim=1):
            some, kv_cache = model(chunk, kv_cache=kv_cache, use_cache=True)
            logits.append(some)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_ragged_rows_equal_rows_alone(config: ThinkerConfig, build: Build) -> None:
    """Catches keys written to the longest row's column, positions of a neighbour, and a look at what lies behind."""
    model = build(config)
    rows = [ids(1, 20, seed=seed) for seed in range(3)]
    starts = [9, 1, 4]
    kv_cache = empty(model, 3)
    # What a slot held before must not matter.
    model(ids(3, 30, seed=9), kv_cache=kv_cache, use_cache=True)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        kv_cache.truncate(b, 0)
        one = kv_cache.rows(b, b + 1)
        model(row[:, :start], kv_cache=one, use_cache=True)
        kv_cache.lengths[b] = one.lengths[0]
    assert kv_cache.lengths == starts
    assert kv_cache.ragged
    done = 0
    for new in (1, 1, 3, 2, 1):
        chunk = torch.cat([row[:, start + done : start + done + new] for row, start in zip(rows, starts, strict=True)])
        logits, _ = model(chunk, kv_cache=kv_cache, use_cache=True)
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            alone = model(row[:, : start + done + new])[0, -new:]
            torch.testing.assert_close(logits[b], alone, rtol=0, atol=1e-12)
        done += new
    assert kv_cache.lengths == [start + done for start in starts]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2])
def test_padded_batch_decodes_like_each_row_alone(config: ThinkerConfig, build: Build, chunk: int) -> None:
    """Catches padding that decoding looks at, and new tokens placed after the padding's positions."""
    model = build(config)
    prompts, continuations = [ids(1, n, seed=n)[0] for n in (7, 1, 4)], ids(3, 6, seed=50)
    tokens, mask = padded(prompts)
    logits, kv_cache = model(tokens, attention_mask=mask, use_cache=True)
    for done in range(0, 6, chunk):
        mask = torch.cat((mask, torch.ones(3, chunk, dtype=mask.dtype)), dim=1)
        new = continuations[:, done : done + chunk]
        logits, kv_cache = model(new, attention_mask=mask, kv_cache=kv_cache, use_cache=True)
        for b, prompt in enumerate(prompts):
            whole = torch.cat((prompt, continuations[b, : done + chunk]))
            torch.testing.assert_close(logits[b], model(whole[None])[0, -chunk:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_cutting_back_and_going_on(config: ThinkerConfig, build: Build) -> None:
    """Catches keys of a forgotten continuation that are still looked at: a shared prefix is reused like this."""
    model = build(config)
    prefix, one, other = ids(1, 8), ids(1, 9, seed=1), ids(1, 5, seed=2)
    _, kv_cache = model(torch.cat((prefix, one), dim=1), use_cache=True)
    kv_cache.truncate(0, 8)
    logits, _ = model(other, kv_cache=kv_cache, use_cache=True)
    wanted = model(torch.cat((prefix, other), dim=1))[:, 8:]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_it_advances_once_per_forward(build: Build) -> None:
    """Catches a length that every layer advances, and a cache hidden in the model that outlives the call."""
    model, tokens = build(ThinkerConfig(**SMALL)), ids(2, 5)
    _, kv_cache = model(tokens, use_cache=True)
    assert kv_cache.lengths == [5, 5]
    first = model(tokens)
    _, same = model(tokens, kv_cache=kv_cache, use_cache=True)
    assert same is kv_cache
    assert kv_cache.lengths == [10, 10]
    assert torch.equal(model(tokens), first)
    before = kv_cache.keys.data_ptr()
    model(tokens, kv_cache=kv_cache, use_cache=True)
    assert kv_cache.keys.data_ptr() == before, "the cache is preallocated, not grown"


@torch.no_grad()
def test_full_to_the_brim_and_no_further(build: Build) -> None:
    """Catches a limit off by one, keys written past the end, and a failed call that leaves the cache half advanced."""
    model, tokens = build(ThinkerConfig(**SMALL)), ids(1, 48)
    logits, kv_cache = model(tokens[:, :47], use_cache=True)
    with pytest.raises(ValueError, match="47 cached \\+ 2 new positions exceed ctx_len 48"):
        model(tokens[:, :2], kv_cache=kv_cache, use_cache=True)
    last, _ = model(tokens[:, 47:], kv_cache=kv_cache, use_cache=True)
    torch.testing.assert_close(torch.cat((logits, last), dim=1), model(tokens), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="48 cached \\+ 1 new positions exceed ctx_len 48"):
        model(tokens[:, :1], kv_cache=kv_cache, use_cache=True)


@torch.no_grad()
def test_mistakes_with_a_cache(build: Build) -> None:
    """Catches a cache silently ignored, broadcast over another batch, or combined with a mask that doesn't cover it."""
    model = build(ThinkerConfig(**SMALL))
    _, kv_cache = model(ids(2, 5), use_cache=True)
    with pytest.raises(ValueError, match="use_cache=True"):
        model(ids(2, 1), kv_cache=kv_cache)
    with pytest.raises(ValueError, match="3 rows, its cache 2"):
        model(ids(3, 1), kv_cache=kv_cache, use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1\).*\(2, 6\)"):
        model(ids(2, 1), attention_mask=torch.ones(2, 1), kv_cache=kv_cache, use_cache=True)
    with pytest.raises(ValueError, match="row 1 holds 5 positions and can't be cut to 6"):
        kv_cache.truncate(1, 6)
    kv_cache.truncate(1, 3)
    with pytest.raises(ValueError, match=r"rows of one length, the cache has \[5, 3\]"):
        model(ids(2, 1), attention_mask=torch.ones(2, 6), kv_cache=kv_cache, use_cache=True)
    assert kv_cache.lengths == [5, 3]


@torch.no_grad()
def test_rows_share_memory_but_not_lengths(config: ThinkerConfig, build: Build) -> None:
    """Catches a copy where a view was promised (a prefill into a slot would be lost), and lengths that are shared."""
    model = build(config)
    kv_cache = empty(model, 4)
    part = kv_cache.rows(1, 3)
    model(ids(2, 6), kv_cache=part, use_cache=True)
    assert (kv_cache.lengths, part.lengths) == ([0, 0, 0, 0], [6, 6])
    assert torch.equal(kv_cache.keys[:, 1:3], part.keys)
    assert float(kv_cache.keys[:, 1:3, :, :6].abs().max()) > 0
    untouched: Tensor = kv_cache.keys[:, [0, 3]]
    assert float(untouched.abs().max()) == 0
