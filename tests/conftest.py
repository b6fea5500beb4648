"""What the proofs share: every architecture at a small size, models whose parameters are all random, and a text.

A test that takes `config` runs once for each architecture; one that concerns some of them says
`@pytest.mark.parametrize("config", ["dense", "moe"], indirect=True)`. Sizes are chosen so that nothing equals anything
else by accident, and that no dimension is so small that a mistake could hide.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

from thinker.config import RopeScaling, ThinkerConfig

if TYPE_CHECKING:  # a test of what needs no torch shall not wait for it
    import torch

    from thinker.model import ThinkerLM

# benchmarks/ is no part of the package, so it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Read once, when torch loads its OpenMP. Threads that wait by spinning make thousands of tiny products some fifteen
# times slower as soon as another process wants a core; sleeping ones do the same sums.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples each time, however slow the machine, and no record of them in the tree.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")

SMALL = {"vocab_size": 61, "n_layers": 3, "d_model": 32, "n_heads": 4, "d_ff": 48, "ctx_len": 48}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"use_gqa": True, "kv_groups": 2},
    "one_group": {"use_gqa": True, "kv_groups": 1},
    "qk_norm": {"use_qk_norm": True},
    "gqa_qk_norm": {"use_gqa": True, "kv_groups": 2, "use_qk_norm": True},
    "moe": {"use_moe": True, "num_experts": 5, "num_experts_per_tok": 2},
    "moe_gqa_qk_norm": {"use_moe": True, "use_gqa": True, "use_qk_norm": True},
    "plain_mlp": {"use_swiglu": False},
    "plain_relu2": {"use_swiglu": False, "activation": "relu2", "use_gqa": True},
    "gelu_gate": {"activation": "gelu"},
    "relu_gate": {"activation": "relu"},
    "layer_scale": {"layer_scale": 0.1},
    "tied": {"tie_embeddings": True},
    "wide_heads": {"head_dim": 12, "use_gqa": True},
    "rope_scaling": {
        "rope_theta": 500.0,
        "rope_scaling": RopeScaling(factor=4.0, original_ctx_len=24, low_freq_factor=1.0, high_freq_factor=4.0),
    },
    "everything": {
        "use_gqa": True,
        "use_moe": True,
        "use_qk_norm": True,
        "head_dim": 12,
        "activation": "gelu",
        "layer_scale": 0.1,
        "tie_embeddings": True,
    },
}


def small(name: str, **fields: Any) -> ThinkerConfig:
    """The architecture of that name, small, with dropout on (so that a test notices where it stays on)."""
    return ThinkerConfig(**(SMALL | ARCHITECTURES[name] | fields))


def randomise(model: Any, seed: int = 0) -> Any:
    """Fill every parameter of any module with its own random numbers, and return the module, in eval mode.

    Matrices keep the scale of what goes through them, so that logits are of the order of 1 and attention is far from
    uniform; vectors (norms, layer scale) lie between 0.5 and 1.5. The same seed gives the same numbers in any dtype.
    """
    import torch

    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                values = torch.rand(parameter.shape, generator=draws) + 0.5
            else:
                values = torch.randn(parameter.shape, generator=draws) * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(values)
    return model.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def config(request: pytest.FixtureRequest) -> ThinkerConfig:
    """One small architecture after another."""
    return small(request.param)


@pytest.fixture
def build() -> Callable[..., ThinkerLM]:
    """build(config, dtype=torch.float64, seed=0): a model in eval mode, all parameters random."""
    import torch

    from thinker.model import ThinkerLM

    def make(config: ThinkerConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> ThinkerLM:
        return randomise(ThinkerLM(config).to(dtype), seed)

    return make


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of words to train on, whose tokens are kept in a cache of the test's own."""
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "eins", "zwei", "drei", "über"]
    path = tmp_path / "words.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 9)) for _ in range(800)), encoding="utf-8")
    return path


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type of numbers that kernels of `fused/` multiply on this processor."""
    import torch

    from thinker.fused import kernels

    chosen: torch.dtype = getattr(torch, request.param)
    if not kernels.multiplies(chosen):
        pytest.skip("this processor doesn't multiply such numbers")
    return chosen
