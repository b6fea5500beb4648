"""The same logits as transformers' own classes, both ways, through folders on disk, offline.

Every parameter is random first. `1e-5 × max|logit|` in float32 is what is promised between implementations; against a
float64 reference transformers itself is off by about a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ARCHITECTURES, randomise, small
from test_loss import targets_with_gaps
from test_model import ids
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from thinker import load
from thinker.checkpoint.publish import Publication, write_view
from thinker.config import ThinkerConfig
from thinker.formats.huggingface import expressible, layout
from thinker.formats.huggingface_config import FAMILIES, family_of
from thinker.loss import NextTokenLoss, balance_loss
from thinker.model import ThinkerLM

Build = Callable[..., ThinkerLM]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 96,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 123_456.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True, "decoder_sparse_step": 1}

# What transformers makes, by class and settings, and what Thinker must take it for.
THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {"use_gqa": False, "head_dim": None}),
    "llama_gqa": ("Llama", {"num_key_value_heads": 2}, {"use_gqa": True, "kv_groups": 2}),
    "llama_one_group": ("Llama", {"num_key_value_heads": 1}, {"use_gqa": True, "kv_groups": 1}),
    "llama_head_dim": ("Llama", {"head_dim": 20, "num_key_value_heads": 2}, {"head_dim": 20}),
    "llama_gelu": ("Llama", {"hidden_act": "gelu"}, {"activation": "gelu"}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "llama_eps": ("Llama", {"rms_norm_eps": 0.1}, {"norm_eps": 0.1}),
    "llama_theta": ("Llama", {"rope_parameters": PLAIN_ROPE}, {"rope_theta": 123_456.0}),
    "llama_scaled": ("Llama", {"rope_parameters": LLAMA3}, {"rope_theta": 500.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}, {"use_moe": True, "num_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_gelu": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "hidden_act": "gelu", "num_key_value_heads": 2},
        {"num_experts_per_tok": 3, "activation": "gelu", "use_gqa": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "num_key_value_heads": 2}, {"use_qk_norm": True, "head_dim": 12}),
    "qwen3_tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}, {"use_qk_norm": True, "head_dim": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"head_dim": 12, "num_experts": 6},
        {"use_moe": True, "use_qk_norm": True, "num_experts": 6, "d_ff": 20},
    ),
    "arcee": ("Arcee", {"num_key_value_heads": 2}, {"use_swiglu": False, "activation": "relu2"}),
    "arcee_gelu": ("Arcee", {"hidden_act": "gelu"}, {"use_swiglu": False, "activation": None}),
}


def assert_logits_agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert float(theirs.std()) > 0.5, "logits this flat would agree by themselves"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", THEIRS)
def test_their_model_is_the_same_here(name: str, tmp_path: Path) -> None:
    """Catches a tensor put in another's place, a setting that isn't read (theta, eps, activation, scaling, ties)."""
    family, settings, meant = THEIRS[name]
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | settings))
    randomise(theirs).save_pretrained(tmp_path)
    ours = load(tmp_path).model
    assert {key: getattr(ours.config, key) for key in meant} == meant
    tokens = ids(2, 96)
    assert_logits_agree(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("config", [name for name in ARCHITECTURES if expressible(small(name)) is None], indirect=True)
def test_our_model_is_the_same_there(config: ThinkerConfig, build: Build, tmp_path: Path) -> None:
    """Catches a wrong class or key in config.json, a layer scale that is not folded, experts under other names."""
    ours = build(config, torch.float32)
    parameters = {name: parameter.numpy() for name, parameter in ours.named_parameters()}
    write_view(tmp_path, 7, config, parameters, Publication(), None)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: found for key, found in report.items() if found} == {}, "transformers left or missed a tensor"
    tokens = ids(2, 48)
    wanted = theirs(tokens).logits
    assert_logits_agree(ours(tokens), wanted)
    assert_logits_agree(load(tmp_path).model(tokens), wanted)


def test_every_class_is_met() -> None:
    """Catches a class that the two tests above no longer reach."""
    classes = {family.class_name for family in FAMILIES}
    assert {f"{family}ForCausalLM" for family, _, _ in THEIRS.values()} == classes
    assert {family_of(small(name)).class_name for name in ARCHITECTURES} == classes


@torch.no_grad()
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10_000.0}, LLAMA3 | {"rope_theta": 500_000.0}])
def test_long_sequences_agree_too(rope: dict[str, Any], tmp_path: Path) -> None:
    """Catches frequencies that are rounded elsewhere: 2048 positions make two last bits of them 2e-4 radians."""
    rope = rope | ({"original_max_position_embeddings": 1024} if "factor" in rope else {})
    sizes = SIZES | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 2048, "rope_parameters": rope}
    theirs = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    theirs.save_pretrained(tmp_path)
    tokens = ids(1, 2048)
    assert_logits_agree(load(tmp_path).model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("config", ["gqa", "moe", "gqa_qk_norm", "moe_gqa_qk_norm", "plain_relu2"], indirect=True)
def test_gradients_agree(config: ThinkerConfig, build: Build, tmp_path: Path) -> None:
    """Catches a backward of ours (chunked loss, grouped experts, blocks) that trains another network than theirs."""
    config = config.changed(n_layers=2, ctx_len=140)
    ours = build(config, torch.float32)
    parameters = {name: parameter.detach().numpy() for name, parameter in ours.named_parameters()}
    write_view(tmp_path, 1, config, parameters, Publication(), None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, targets = ids(1, 140), targets_with_gaps(1, 140)
    parts = NextTokenLoss(ours)(tokens, targets)
    wanted = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert parts.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    parts.total.backward()
    wanted.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in ours.named_parameters()}
    # A gradient is named and cut like its parameter; one name per expert is theirs on disk, stacked ones in memory.
    for name, recipe in layout(config, fused_experts=config.use_moe).items():
        expected = recipe.assemble(lambda their_name: theirs.get_parameter(their_name).grad.numpy())
        # Backward amplifies the forward's 1e-5 by some factor; a mistake is of the order of 1.
        assert np.linalg.norm(gradients[name] - expected) < 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_balance_loss_agrees_but_for_its_scale(chosen: int) -> None:
    """Catches another formula: for one layer theirs is ours times the experts per token, padding left out in both."""
    logits = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for given in (None, mask):
        theirs = load_balancing_loss_func((logits.flatten(0, 1),), 6, chosen, given)
        assert float(balance_loss((logits,), given, chosen)) * chosen == pytest.approx(float(theirs), rel=1e-5)
