"""Proofs of the Hugging Face tables against transformers itself: names, shapes, settings, both ways, bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, small
from test_publish import run_with
from test_training_state import parameters
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from thinker.checkpoint.writer import write_safetensors
from thinker.config import RopeScaling, ThinkerConfig
from thinker.formats import open_model
from thinker.formats.huggingface import expressible, layout, to_huggingface
from thinker.formats.huggingface_config import disagreement, family_of, read_config, write_config
from thinker.formats.tensors import foreign_shapes, parameter_shapes
from thinker.model import ThinkerLM
from thinker.rope import inverse_frequencies
from thinker.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 12}
# Every class, its own defaults where a key is left out.
CLASSES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 5} | EXPERTS,
    "qwen3": {"intermediate_size": 48},
    "qwen3_moe": {"intermediate_size": 80, "moe_intermediate_size": 40, "num_experts": 5, "norm_topk_prob": True}
    | EXPERTS,
    "arcee": {"intermediate_size": 48, "hidden_act": "gelu"},
}


def theirs(model_type: str, **settings: Any) -> Any:
    """A transformers model of random parameters, norms included."""
    config = AutoConfig.for_model(model_type, **(SIZES | CLASSES[model_type] | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def reference(model: Any, name: str) -> np.ndarray:
    return model.state_dict()[name].numpy()


def assert_same_tensors(folder: Path, model: Any) -> None:
    """Thinker's tensors against transformers' in memory, by hand-written correspondence: not the table under test."""
    files = open_model(folder)
    config, tensors = files.config, files.tensors
    pairs = {"tok_emb.weight": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    if not config.tie_embeddings:
        pairs["head.weight"] = "lm_head.weight"
    for i in range(config.n_layers):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"
        pairs[f"{ours}.norm1.scale"] = f"{layer}.input_layernorm.weight"
        pairs[f"{ours}.norm2.scale"] = f"{layer}.post_attention_layernorm.weight"
        pairs[f"{ours}.attn.out_proj.weight"] = f"{layer}.self_attn.o_proj.weight"
        if config.use_qk_norm:
            pairs[f"{ours}.attn.q_norm.scale"] = f"{layer}.self_attn.q_norm.weight"
            pairs[f"{ours}.attn.k_norm.scale"] = f"{layer}.self_attn.k_norm.weight"
        rows = [reference(model, f"{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        if config.use_gqa:
            for part, expected in zip("qkv", rows, strict=True):
                assert np.array_equal(tensors[f"{ours}.attn.{part}.weight"], expected)
        else:
            assert np.array_equal(tensors[f"{ours}.attn.qkv.weight"], np.concatenate(rows))
        if config.use_moe:
            pairs[f"{ours}.moe.router.weight"] = f"{layer}.mlp.gate.weight"
            pairs[f"{ours}.moe.experts.down_proj"] = f"{layer}.mlp.experts.down_proj"
            both = reference(model, f"{layer}.mlp.experts.gate_up_proj")
            halves = [tensors[f"{ours}.moe.experts.{part}_proj"] for part in ("gate", "up")]
            assert np.array_equal(np.concatenate(halves, axis=1), both)
        else:
            for part in ("gate_proj", "up_proj", "down_proj") if config.use_swiglu else ("up_proj", "down_proj"):
                pairs[f"{ours}.mlp.{part}.weight"] = f"{layer}.mlp.{part}.weight"
    for name, their_name in pairs.items():
        assert np.array_equal(tensors[name], reference(model, their_name)), name
    assert set(tensors) == set(parameter_shapes(config))


# --- from Thinker to transformers -------------------------------------------------------------------------------------


def test_parameter_names_are_the_models(config: ThinkerConfig) -> None:
    """Catches a parameter added to the network and forgotten here, or of another shape."""
    found = {name: tuple(parameter.shape) for name, parameter in ThinkerLM(config).named_parameters()}
    assert found == parameter_shapes(config)


def test_transformers_loads_what_is_published(tmp_path: Path, config: ThinkerConfig) -> None:
    """Catches a name or shape that transformers misses, doesn't expect, or fills with random numbers."""
    config = config.changed(rope_theta=700.0)  # nobody's default
    run = run_with(tmp_path, config, 1)
    model, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == family_of(config).class_name
    assert_same_tensors(run, model)
    assert model.config.rms_norm_eps == config.norm_eps
    assert model.config.max_position_embeddings == config.ctx_len
    # The frequencies it computes from its settings, to the rounding of one float32 power.
    assert np.allclose(model.model.rotary_emb.inv_freq.numpy(), inverse_frequencies(config), rtol=3e-7)


def test_writing_and_reading_gives_the_same_bits(config: ThinkerConfig) -> None:
    """Catches a table that is not its own inverse, and copies where a view would do."""
    config = config.changed(layer_scale=None)
    values = parameters(config)
    foreign = to_huggingface(config, values, "here")
    assert {name: array.shape for name, array in foreign.items()} == foreign_shapes(layout(config))
    assert all(np.shares_memory(array, next(iter(_owners(array, values)))) for array in foreign.values())
    for name, recipe in layout(config).items():
        assert np.array_equal(recipe.assemble(foreign.__getitem__), values[name]), name


def _owners(array: np.ndarray, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [value for value in values.values() if np.may_share_memory(array, value)]


def test_settings_survive(config: ThinkerConfig) -> None:
    """Catches a setting that is written under a key nobody reads."""
    config = config.changed(layer_scale=None, rope_theta=700.0, norm_eps=1e-4, ctx_len=50)
    values = json.loads(json.dumps(write_config(config, "float32")))
    assert disagreement(read_config(values, "here"), config) is None
    # Each major finds all it needs under its own keys.
    for others in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        assert disagreement(read_config({k: v for k, v in values.items() if k not in others}, "here"), config) is None


def test_every_architecture_has_the_class_of_the_design() -> None:
    """Catches a model published as something that computes another function."""
    classes = {name: family_of(small(name)).class_name for name in ARCHITECTURES}
    assert classes["dense"] == classes["gqa"] == classes["tied"] == classes["layer_scale"] == "LlamaForCausalLM"
    assert classes["moe"] == "MixtralForCausalLM"
    assert classes["qk_norm"] == classes["gqa_qk_norm"] == "Qwen3ForCausalLM"
    assert classes["moe_gqa_qk_norm"] == classes["everything"] == "Qwen3MoeForCausalLM"
    assert classes["plain_mlp"] == classes["plain_relu2"] == "ArceeForCausalLM"
    assert all(expressible(small(name)) is None for name in ARCHITECTURES)
    own = small("plain_mlp", use_qk_norm=True)
    assert "plain MLP together with QK-norm" in (expressible(own) or "")
    assert family_of(own).class_name == "ThinkerForCausalLM"
    uneven = small("dense", n_heads=3, head_dim=10)
    assert "32 that its 3 heads don't divide" in (expressible(uneven) or "")
    assert expressible(uneven.changed(use_qk_norm=True)) is None


@pytest.mark.parametrize("name", ["moe", "moe_gqa_qk_norm"])
def test_both_majors_read_the_experts_names(name: str) -> None:
    """Catches transformers 5's fused names in the file, which transformers 4 and llama.cpp don't know."""
    config = small(name)
    names = foreign_shapes(layout(config))
    inner = "block_sparse_moe.experts.4.w2" if name == "moe" else "mlp.experts.4.down_proj"
    assert names[f"model.layers.2.{inner}.weight"] == (32, 48)
    assert not any("gate_up" in name for name in names)
    values = write_config(config, "float32")
    assert values["num_experts"] == values["num_local_experts"] == config.num_experts
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    if config.use_qk_norm:
        assert values["norm_topk_prob"] is True
        assert values["mlp_only_layers"] == []


def test_the_tokenizer_is_the_same_there(tmp_path: Path) -> None:
    """Catches a token gained, ids shifted, or bos put in front twice or never in transformers."""
    tokenizer = Tokenizer.train(["some words to learn, and some words again"] * 3, 300)
    run = run_with(
        tmp_path,
        small("dense", vocab_size=300),
        1,
        tokenizer.to_json(),
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
        add_bos=True,
        chat_template="{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}",
    )
    found = AutoTokenizer.from_pretrained(run)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
    assert len(found) == tokenizer.vocab_size
    for text in ("some words", "  two  spaces\n\n", "déjà vu 🙂 12345", ""):
        assert found(text).input_ids == tokenizer.encode(text, bos=True), text
    chat = found.apply_chat_template([{"role": "user", "content": "some words"}], tokenize=True)
    ids = chat["input_ids"] if isinstance(chat, dict | transformers.BatchEncoding) else chat
    assert ids == [1, tokenizer.special_ids["<|user|>"], *tokenizer.encode("some words"), 6]
    generation = GenerationConfig.from_pretrained(run)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


# --- from transformers to Thinker -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("model_type", CLASSES)
def test_opens_what_transformers_saves(tmp_path: Path, model_type: str, kv_heads: int) -> None:
    """Catches a default of a class that Thinker doesn't know, and q, k and v joined in another order."""
    model = theirs(model_type, num_key_value_heads=kv_heads)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, model)
    config = open_model(tmp_path).config
    assert (config.use_gqa, config.n_kv_heads) == (kv_heads != 4, kv_heads)
    assert config.norm_eps == model.config.rms_norm_eps
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.activation_name == model.config.hidden_act
    assert config.head_width == model.model.layers[0].self_attn.head_dim
    assert config.dropout == 0


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_opens_shards_and_tied_models(tmp_path: Path, model_type: str, tied: bool) -> None:
    """Catches a head read from nowhere when it is tied, and tensors lost between shards."""
    model = theirs(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(tmp_path, model)
    assert open_model(tmp_path).config.tie_embeddings is tied


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_opens_fused_experts(tmp_path: Path, model_type: str) -> None:
    """Catches gate and up swapped where they are stored as one."""
    model = theirs(model_type)
    model.save_pretrained(tmp_path, save_original_format=False)
    import safetensors

    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert any("gate_up_proj" in name for name in file.keys())  # noqa: SIM118 (it is no mapping)
    assert_same_tensors(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opens_narrow_types(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches bfloat16 read as float16 or widened wrongly."""
    model = theirs("qwen3").to(dtype)
    model.save_pretrained(tmp_path)
    files = open_model(tmp_path)
    assert files.dtype == str(dtype).removeprefix("torch.")
    expected = model.model.embed_tokens.weight.detach().float().numpy()
    assert np.array_equal(np.asarray(files.tensors["tok_emb.weight"], np.float32), expected)


def test_tied_files_that_carry_the_head_too(tmp_path: Path) -> None:
    """Catches a refusal of old files, which hold the tied head and RoPE's frequencies as well."""
    model = theirs("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    assert_same_tensors(tmp_path, model)
    tensors["lm_head.weight"][0, 0] += 1
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding, so set tie_word_embeddings to false"):
        open_model(tmp_path)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_ctx_len=32)


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | ORIGINAL}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 500000}}, 5e5, None),
        ({"rope_parameters": LLAMA3 | ORIGINAL | {"rope_theta": 5e5}}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3 | ORIGINAL}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | ORIGINAL, "rope_parameters": {"rope_theta": 5e5}}, 5e5, SCALED),
    ],
)
def test_rope_in_the_forms_of_both_majors(settings: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """Catches rope_parameters missed and theta 10000 assumed in silence; transformers itself is the judge."""
    values = SIZES | CLASSES["llama"] | {"model_type": "llama", "head_dim": 64} | settings
    config = read_config(values, "here")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    judged = AutoConfig.for_model(**values)
    frequencies = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(judged).inv_freq.numpy()
    assert np.allclose(frequencies, inverse_frequencies(config), rtol=3e-7)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "arcee"])
def test_no_number_of_key_value_heads_means_as_many_as_query_heads(model_type: str) -> None:
    """Catches null taken for the class's own number, which other heads than these would need."""
    values = SIZES | CLASSES[model_type] | {"model_type": model_type, "num_key_value_heads": None}
    assert read_config(values, "here").n_kv_heads == AutoConfig.for_model(**values).num_key_value_heads == 4


GOOD = SIZES | CLASSES["llama"] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; Thinker opens llama, mixtral"),
        ({"model_type": None}, "model_type 'None'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"sliding_window": 16}, "sliding_window 16"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by kind of layer"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is given as 10000.0 and as 1000000.0",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3 | ORIGINAL},
            "rope_type is default in rope_scaling and llama3 in rope_parameters",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": LLAMA3 | ORIGINAL},
            "rope_type is linear in rope_scaling and llama3 in rope_parameters",
        ),
        (
            {"rope_scaling": LLAMA3 | ORIGINAL, "rope_parameters": LLAMA3 | ORIGINAL | {"factor": 4.0}},
            "factor is 8.0 in rope_scaling and 4.0 in rope_parameters",
        ),
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings must be a whole number"),
        ({"rope_scaling": LLAMA3 | ORIGINAL | {"factor": "8"}}, "factor must be a number"),
        ({"rope_scaling": LLAMA3 | ORIGINAL | {"factor": 0.5}}, "factor is 0.5"),
        ({"logit_scale": 0.1}, "logit_scale 0.1"),
        ({"embedding_multiplier": 12}, "embedding_multiplier 12"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": 3}, "not divisible by n_heads 3"),
        ({"num_key_value_heads": 3}, "not divisible by kv_groups 3"),
        ({"num_key_value_heads": 0}, "kv_groups"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, found 32"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number, found None"),
        ({"num_hidden_layers": 0}, "n_layers is 0"),
        ({"rms_norm_eps": 0}, "norm_eps is 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is too large"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"max_position_embeddings": 2**21}, "max_position_embeddings 2097152 is beyond 1048576"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    """Catches a model run wrongly because a setting was passed over."""
    read_config(GOOD, "config.json")
    with pytest.raises(ValueError, match=f"config.json: .*{reason}") as caught:
        read_config(GOOD | change, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "change", "reason"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob must be true"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob must be true"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_local_experts and num_experts differ"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 5"),
        ("mixtral", {"sliding_window": 40}, "sliding_window 40"),
        ("qwen3", {"sliding_window": 40, "use_sliding_window": True}, "sliding_window 40"),
    ],
)
def test_settings_of_one_class_are_refused_by_name(model_type: str, change: dict[str, Any], reason: str) -> None:
    """Catches a mixture run with weights that don't sum to 1, or attention that sees more than it should."""
    values = SIZES | CLASSES[model_type] | {"model_type": model_type}
    read_config(values, "config.json")
    with pytest.raises(ValueError, match=reason):
        read_config(values | change, "config.json")


def test_windows_that_hide_nothing_are_allowed() -> None:
    """Catches a refusal of Qwen3 as it is published: a window is given there, and not in use."""
    qwen = SIZES | CLASSES["qwen3"] | {"model_type": "qwen3", "sliding_window": 40, "use_sliding_window": False}
    mixtral = SIZES | CLASSES["mixtral"] | {"model_type": "mixtral", "sliding_window": 48}
    for values in (qwen, qwen | {"use_sliding_window": None}, mixtral):
        read_config(values, "config.json")


ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2**40,
    10**400,
    0.5,
    1e308,
    "",
    "a\nb",
    [],
    [1],
    [[]],
    {},
    {"a": {}},
    {"rope_type": 1},
)


@pytest.mark.parametrize("model_type", CLASSES)
def test_odd_values_raise_nothing_but_value_error(model_type: str) -> None:
    """Catches a TypeError, an endless loop or a message of two lines for any value of any key."""
    good = json.loads(
        json.dumps(
            write_config(
                read_config(
                    GOOD | CLASSES[model_type] | {"model_type": model_type, "architectures": None, "head_dim": 12}, "x"
                ),
                "float32",
            )
        )
    )
    scaled = LLAMA3 | ORIGINAL | {"rope_theta": 10000.0}
    for key in (*good, "bias", "quantization_config", "layer_types", "norm_topk_prob", "partial_rotary_factor"):
        for value in ODD:
            _only_value_error(good | {key: value})
    for key in scaled:
        for value in ODD:
            _only_value_error(good | {"rope_parameters": scaled | {key: value}})
            _only_value_error(good | {"rope_scaling": scaled | {key: value}})


def _only_value_error(values: dict[str, Any]) -> None:
    refusal = refused(lambda: read_config(values, "here"))
    assert refusal is None or (refusal.startswith("here: ") and "\n" not in refusal)


def refused(attempt: Callable[[], Any]) -> str | None:
    """What a `ValueError` said, None if there was none."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


# --- whole folders ----------------------------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    theirs("llama").save_pretrained(folder)
    return folder


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """The same weights with some replaced, added or, for None, taken away."""
    import safetensors.numpy

    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path) | changes
    safetensors.numpy.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_tensors_that_contradict_the_configuration(tmp_path: Path) -> None:
    """Catches a tensor reshaped, left out or passed over in silence."""
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    for changes, reason in (
        ({down: np.ones((48, 32), np.float32)}, r"down_proj\.weight has shape \[48, 32\].* says \[32, 48\]"),
        ({down: None}, rf"missing {down}"),
        ({"lm_head.weight": None}, "lm_head.weight is missing, and tie_word_embeddings is not true"),
        ({"model.layers.1.mlp.down_proj.bias": np.ones(32, np.float32)}, "unexpected .*bias"),
        ({norm: np.ones(32, np.int32)}, "norm.weight has type int32"),
    ):
        folder = saved(tmp_path)
        rewrite(folder, **changes)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=reason) as caught:
            open_model(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_weights_are_refused_when_read(tmp_path: Path, value: float) -> None:
    """Catches a diverged model that answers with noise, and a scan of tensors nobody asked for."""
    name = "model.layers.1.mlp.up_proj.weight"
    bad = np.ones((48, 32), np.float32)
    bad[-1, -1] = value
    rewrite(saved(tmp_path), **{name: bad})
    files = open_model(tmp_path)
    assert files.tensors["blocks.0.mlp.up_proj.weight"].shape == (48, 32)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        files.tensors["blocks.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_promise_of_endless_layers_costs_nothing(tmp_path: Path, key: str) -> None:
    """Catches a table of 10^12 names made before anybody looks into the file."""
    theirs("mixtral").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {key: 10**12}))
    with pytest.raises(ValueError, match=r"its configuration has \d+ experts, its weights only"):
        open_model(tmp_path)


def test_paths_that_are_no_model_are_named(tmp_path: Path) -> None:
    """Catches a traceback where a sentence would help: a typing error in a path is the commonest mistake."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "tiny.json").write_text("{}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    saved(tmp_path / "whole")
    for path, reason in (
        ("none", "no such file or folder"),
        ("empty", "has no config.json"),
        ("pickled", "pytorch_model.bin: is a pickle file"),
        ("pickled/pytorch_model.bin", "is a pickle file"),
        ("gguf", "to open model.gguf give its own path"),
        ("notes.txt", "is no model"),
        ("half", "has neither model.safetensors nor"),
        ("broken", "config.json: not valid JSON"),
        ("whole/model.safetensors", "give the folder .*whole instead"),
        ("whole/config.json", "give the folder .*whole instead"),
        ("tiny.json", r"holds no weights; if it describes a model, train it: thinker train .*tiny\.json"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            open_model(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)
    (tmp_path / "half" / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.bin: is a pickle file"):
        open_model(tmp_path / "half")


# --- text -------------------------------------------------------------------------------------------------------------


def with_text(folder: Path, tokenizer: str | None = None, **files: Any) -> Any:
    """A folder's text files replaced by these."""
    saved(folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": 3}))
    return open_model(folder)


def tiny_tokenizer(**changes: Any) -> str:
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "a", "b"])}
    added = [{"id": n, "content": t, "special": True} for t, n in vocab.items() if t.startswith("<")]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return json.dumps({"model": model, "added_tokens": added, "post_processor": None} | changes)


BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def test_special_tokens_are_found_where_they_are(tmp_path: Path) -> None:
    """Catches generation that never stops because eos stands in another file than expected."""
    assert with_text(tmp_path, generation_config={"eos_token_id": [1, 3]}).eos_ids == (1, 3)
    assert with_text(tmp_path, generation_config={}).eos_ids == (3,)
    assert with_text(tmp_path, generation_config={"eos_token_id": 10**6, "pad_token_id": True}).eos_ids == ()
    files = with_text(tmp_path, tiny_tokenizer(), generation_config={}, tokenizer_config={"bos_token": "<s>"})
    assert (files.bos_id, files.add_bos) == (0, False)
    for token in ("<s>", {"content": "<s>", "lstrip": False}):
        files = with_text(tmp_path, tiny_tokenizer(), tokenizer_config={"bos_token": token, "add_bos_token": True})
        assert (files.bos_id, files.add_bos) == (0, True)
    for processor in (BOS_FIRST, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, BOS_FIRST]}):
        for settings in ({"bos_token": "<s>"}, {}):
            files = with_text(tmp_path, tiny_tokenizer(post_processor=processor), tokenizer_config=settings)
            assert (files.bos_id, files.add_bos) == (0, True)


def test_chat_templates_are_found_where_they_are(tmp_path: Path) -> None:
    """Catches a chat model spoken to without its template."""
    assert with_text(tmp_path, tokenizer_config={}).chat_template is None
    assert with_text(tmp_path, tokenizer_config={"chat_template": "one"}).chat_template == "one"
    named = [{"name": "tools", "template": "two"}, {"name": "default", "template": "three"}]
    assert with_text(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert with_text(tmp_path, tokenizer_config={"chat_template": "one"}).chat_template == "four"


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (tiny_tokenizer(added_tokens=[{"id": 61, "content": "x"}]), r"ids up to 61, the model's vocab_size is 61"),
        (tiny_tokenizer(model=None), "has no model with a vocabulary"),
        (tiny_tokenizer(model={"vocab": {"a": "b"}}), "must map tokens to ids"),
        (tiny_tokenizer(model={"vocab": {"a": -1}}), "must map tokens to ids"),
        (tiny_tokenizer(added_tokens=[{}]), "an added token has no content"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path, tokenizer: str, reason: str) -> None:
    """Catches an id beyond the embedding, which would fail much later or read foreign memory."""
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{reason}"):
        with_text(tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config", "tokenizer"])
def test_odd_text_files_raise_nothing_but_value_error(tmp_path: Path, name: str) -> None:
    """Catches a TypeError from a file that another program, or nobody, wrote."""
    saved(tmp_path)
    tokenizer = json.loads(tiny_tokenizer(post_processor=BOS_FIRST))
    good = {
        "generation_config": {"eos_token_id": [1], "bos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config": {"bos_token": "<s>", "add_bos_token": True, "chat_template": "x"},
        "tokenizer": tokenizer | {"normalizer": None},
    }[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    nested = [
        (tokenizer["model"], "vocab"),
        (tokenizer["added_tokens"][0], "content"),
        (tokenizer["added_tokens"][0], "id"),
        *((tokenizer["post_processor"], key) for key in BOS_FIRST),
        *((tokenizer["post_processor"]["single"][0]["SpecialToken"], key) for key in ("id", "type_id")),
    ]
    for place, key in [(good, key) for key in good] + (nested if name == "tokenizer" else []):
        kept = place[key]
        for value in ODD:
            place[key] = value
            (tmp_path / f"{name}.json").write_text(json.dumps(good))
            assert "\n" not in (refused(lambda: open_model(tmp_path)) or "")
        place[key] = kept


def test_transformers_reads_our_settings_without_a_warning(tmp_path: Path) -> None:
    """Catches keys that a new major complains about, which users would take for an error."""
    run = run_with(tmp_path, small("rope_scaling"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.from_pretrained(run)
        GenerationConfig.from_pretrained(run).validate(strict=True)
    assert config.rope_parameters["rope_type"] == "llama3"
