"""The angles of RoPE, and what turning by them must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from thinker.attention import rotate
from thinker.config import RopeScaling, ThinkerConfig
from thinker.model import RotaryEmbedding, ThinkerLM
from thinker.rope import inverse_frequencies, rope_tables

EPS32 = 2.0**-24  # half a unit in the last place of 1


def tables(config: ThinkerConfig, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_tables(config, length)
    return torch.from_numpy(cos).double(), torch.from_numpy(sin).double()


@pytest.mark.parametrize("theta", [10_000.0, 500.0, 1_000_000.0])
def test_tables_are_cosine_and_sine_of_position_times_frequency(theta: float) -> None:
    """Catches exponents over head_dim / 2 in place of head_dim, an ignored rope_theta, positions that start at 1."""
    config = ThinkerConfig(rope_theta=theta, ctx_len=600)
    cos, sin = rope_tables(config)
    angles = np.arange(600)[:, None] * theta ** (-2 * np.arange(32) / 64)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (600, 32)
    # The exponent, the power, its reciprocal and the angle may each be rounded to float32 on the way.
    tolerance = (3 + np.log(theta)) * EPS32 * angles + EPS32
    assert np.all(np.abs(cos - np.cos(angles)) <= tolerance)
    assert np.all(np.abs(sin - np.sin(angles)) <= tolerance)


def test_tables_of_another_length_begin_alike() -> None:
    """Catches angles that depend on how long the table is, so that a longer context would change short texts."""
    config = ThinkerConfig()
    for short, long in zip(rope_tables(config), rope_tables(config, 2000), strict=True):
        np.testing.assert_array_equal(short, long[: len(short)])


def test_half_split_convention() -> None:
    """Catches interleaved pairs (2i, 2i + 1), with which imported and exported weights speak gibberish."""
    cos, sin = tables(ThinkerConfig(d_model=32, n_heads=4))
    for i in range(4):
        x = torch.eye(8, dtype=torch.float64)[i].expand(1, 1, 512, 8)
        wanted = torch.zeros(512, 8, dtype=torch.float64)
        wanted[:, i], wanted[:, i + 4] = cos[:, i], sin[:, i]
        torch.testing.assert_close(rotate(x, cos, sin)[0, 0], wanted, rtol=0, atol=0)


def test_scores_depend_on_distance_alone() -> None:
    """Catches absolute positions leaking into scores: angles not linear in the position, q and k turned differently."""
    config = ThinkerConfig(head_dim=16)
    cos, sin = tables(config)
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned_q, turned_k = (rotate(x.expand(1, 1, 512, 16), cos, sin)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    # Each angle is off by up to 512 half units in the last place of float32, and each of its cosines by half of one.
    tolerance = float(q.norm() * k.norm()) * 4 * 512 * EPS32
    for distance in (0, 1, 7, 300):
        along = scores.diagonal(-distance)
        assert float(along.max() - along.min()) < tolerance
    assert float(scores[100].max() - scores[100].min()) > 1000 * tolerance, "scores don't depend on distance at all"


def test_position_zero_and_lengths_stay() -> None:
    """Catches a rotation that scales, or a table that starts elsewhere than at the identity."""
    cos, sin = tables(ThinkerConfig())
    x = torch.randn(2, 3, 512, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=4 * EPS32, atol=0)
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1], atol=0.1)


def test_llama3_scaling_bands() -> None:
    """Catches the bands exchanged: fast waves must stay, slow ones be stretched by `factor`, the rest lie between."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_ctx_len=8192)
    plain = ThinkerConfig(head_dim=128, rope_theta=500_000.0)
    before, after = inverse_frequencies(plain), inverse_frequencies(plain.changed(rope_scaling=scaling.model_dump()))
    waves = 2 * np.pi / before.astype(np.float64)
    fast, slow = waves < 8192 / 4, waves > 8192 / 1
    between = ~fast & ~slow
    assert min(fast.sum(), slow.sum(), between.sum()) >= 5
    np.testing.assert_array_equal(after[fast], before[fast])
    np.testing.assert_allclose(after[slow], before[slow] / 8, rtol=2 * EPS32)
    share = (8192 / waves - 1) / (4 - 1)  # of the unscaled frequency: 0 at the slow end, 1 at the fast end
    wanted = (1 - share) * before / 8 + share * before
    np.testing.assert_allclose(after[between], wanted[between], rtol=32 * EPS32)


@torch.no_grad()
def test_values_are_not_turned(config: ThinkerConfig, build: Callable[..., ThinkerLM]) -> None:
    """Catches RoPE applied to v, or q and k left unturned."""
    attention = build(config).blocks[0].attn
    x = torch.randn(1, 9, config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rope = RotaryEmbedding(config)
    q0, k0, v0 = attention.project(x, rope(torch.zeros(9, dtype=torch.long)))
    q1, k1, v1 = attention.project(x, rope(torch.arange(9) + 5))
    assert torch.equal(v0, v1)
    assert float((q0 - q1).abs().amax(dim=-1).min()) > 0.01
    assert float((k0 - k1).abs().amax(dim=-1).min()) > 0.01


def test_bfloat16_model_keeps_its_angles(build: Callable[..., ThinkerLM]) -> None:
    """Catches tables rounded by model.bfloat16(): past position 256 neighbours would share their angles."""
    model = build(ThinkerConfig(n_layers=1, ctx_len=600), torch.float32)
    before = model.rope.cos.clone(), model.rope.sin.clone()
    for changed in (model.bfloat16(), model.double(), model.half(), model.float()):
        assert changed.rope.cos.dtype == changed.rope.sin.dtype == torch.float32
        assert torch.equal(changed.rope.cos, before[0])
        assert torch.equal(changed.rope.sin, before[1])
    assert "rope.cos" not in model.state_dict(), "tables are rebuilt, not saved"


def test_autocast_keeps_its_angles(build: Callable[..., ThinkerLM]) -> None:
    """Catches the rotation done in bfloat16 under autocast: a q of 1 must turn as far as in float32."""
    attention = build(ThinkerConfig(n_layers=1, ctx_len=600), torch.float32).blocks[0].attn
    rotation = RotaryEmbedding(ThinkerConfig(ctx_len=600))(torch.arange(600))
    x = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(4)).expand(1, 600, 256)
    with torch.autocast("cpu", torch.bfloat16):
        still = attention.project(x, (torch.ones(1), torch.zeros(1)))[0]
        turned = attention.project(x, rotation)[0]
    assert turned.dtype == torch.bfloat16
    wanted = rotate(still.double(), *(part.double() for part in rotation))
    # One rounding to bfloat16 (8 bits) of the result, nothing else.
    assert bool(((turned.double() - wanted).abs() <= wanted.abs() * 2.0**-8).all())
