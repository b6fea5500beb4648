"""What vLLM needs of a folder, checked without it: it doesn't run on this machine.

From its model code (llama, mixtral, qwen3, qwen3_moe, arcee in its model_executor/models): an architecture that it
registers; tensors that, after q, k, v and gate, up are stacked, are exactly its parameters; silu in every gate, and
relu2 in the plain MLP; a head width that its attention kernels have; a tokenizer that transformers opens, no larger
than the embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, randomise, small

from thinker.checkpoint.publish import Publication, write_view
from thinker.checkpoint.reader import read_safetensors
from thinker.formats.gguf_export import exportable
from thinker.formats.huggingface import expressible
from thinker.model import ThinkerLM
from thinker.tokenizer import Tokenizer
from thinker.train.config import read_settings

CONFIGS = Path(__file__).parents[1] / "configs"
REGISTERED = {
    "LlamaForCausalLM", "MixtralForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "ArceeForCausalLM",
}  # fmt: skip
# What its kernels for processors, for accelerators and of FlashInfer have in common (get_supported_head_sizes).
HEAD_WIDTHS = {64, 128, 256}
STACKED = (
    (r"\.(q|k|v)_proj\.", ".qkv_proj."),
    (r"mlp\.(gate|up)_proj\.", "mlp.gate_up_proj."),
    (r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight", ".experts.w13_weight"),
    (r"\.experts\.\d+\.(w2|down_proj)\.weight", ".experts.w2_weight"),
)


def parameters_of_vllm(config):
    """Names and numbers of values of the parameters that vLLM's module has for this architecture."""
    D, F, width = config.d_model, config.d_ff, config.head_width
    heads = config.n_heads + 2 * config.n_kv_heads
    expected = {"model.embed_tokens.weight": config.vocab_size * D, "model.norm.weight": D}
    if not config.tie_embeddings:
        expected["lm_head.weight"] = config.vocab_size * D
    for layer in range(config.n_layers):
        at = f"model.layers.{layer}"
        expected |= {
            f"{at}.input_layernorm.weight": D,
            f"{at}.post_attention_layernorm.weight": D,
            f"{at}.self_attn.qkv_proj.weight": heads * width * D,
            f"{at}.self_attn.o_proj.weight": D * config.n_heads * width,
        }
        if config.use_qk_norm:
            expected |= {f"{at}.self_attn.q_norm.weight": width, f"{at}.self_attn.k_norm.weight": width}
        if config.use_moe:
            mixture = f"{at}.mlp" if config.use_qk_norm else f"{at}.block_sparse_moe"
            expected |= {
                f"{mixture}.gate.weight": config.num_experts * D,
                f"{mixture}.experts.w13_weight": config.num_experts * 2 * F * D,
                f"{mixture}.experts.w2_weight": config.num_experts * D * F,
            }
        elif config.use_swiglu:
            expected |= {f"{at}.mlp.gate_up_proj.weight": 2 * F * D, f"{at}.mlp.down_proj.weight": D * F}
        else:
            expected |= {f"{at}.mlp.up_proj.weight": F * D, f"{at}.mlp.down_proj.weight": D * F}
    return expected


def stacked(name, gated):
    for pattern, replacement in STACKED:
        if "gate_up" not in replacement or gated:
            name = re.sub(pattern, replacement, name)
    return name


def runs_there(config):
    """Whether vLLM computes this network; it refuses Llama's and Arcee's other activations, and ignores a mixture's."""
    return expressible(config) is None and config.activation_name == ("silu" if config.use_swiglu else "relu2")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if runs_there(small(name))])
def test_a_folder_has_what_vllm_loads(tmp_path, name):
    """Bug: a tensor that vLLM doesn't know, or one that it misses and leaves at random."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.train(["some words, some more words"], 310)
    config = small(name, vocab_size=tokenizer.vocab_size)
    model = randomise(ThinkerLM(config))
    arrays = {key: p.detach().numpy() for key, p in model.named_parameters()}
    about = Publication(bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id, add_bos=True)
    write_view(tmp_path, 1, config, arrays, about, tokenizer.to_json())

    values = json.loads((tmp_path / "config.json").read_text())
    assert set(values["architectures"]) <= REGISTERED
    assert values["max_position_embeddings"] == config.ctx_len
    assert values["num_attention_heads"] % values["num_key_value_heads"] == 0
    assert values["head_dim"] == config.head_width
    assert values["torch_dtype"] == "float32"
    file = read_safetensors(tmp_path / "model.safetensors")
    found = {}
    for key in file:
        assert "rotary" not in key
        place = stacked(key, config.use_swiglu)
        found[place] = found.get(place, 0) + file[key].size
    assert found == parameters_of_vllm(config)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert len(opened) <= values["vocab_size"]
    assert opened("words")["input_ids"] == tokenizer.encode("words", bos=True)


def test_vllm_and_llama_cpp_know_the_same_activations():
    """Bug: a gate with gelu is offered to a program that would compute silu, or refuse it at the other end."""
    for name in ARCHITECTURES:
        config = small(name, layer_scale=None)
        assert runs_there(config) == (exportable(config) is None), name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_configurations_have_heads_for_its_kernels(path):
    """Bug: a model trained for days, and no attention kernel elsewhere has its head width."""
    architecture, _, _ = read_settings(path, {})
    assert architecture.head_width in HEAD_WIDTHS
