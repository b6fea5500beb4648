"""The architecture's description: defaults, files, errors, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from thinker.config import ThinkerConfig, read_json_with_comments

TINY = Path(__file__).parent.parent / "configs" / "thinker_tiny.json"


def test_tiny_file_is_the_default_and_has_comments() -> None:
    """Catches a default that drifts away from the documented file, and a reader that stumbles over comments."""
    assert "// " in TINY.read_text()
    assert ThinkerConfig.from_json(TINY) == ThinkerConfig()


def test_tiny_values() -> None:
    """Catches both the file and the defaults being changed together: the published table is the contract."""
    table = {
        "vocab_size": 5000,
        "n_layers": 4,
        "d_model": 256,
        "n_heads": 4,
        "d_ff": 1024,
        "dropout": 0.1,
        "rope_theta": 10000,
        "ctx_len": 512,
        "use_swiglu": True,
        "use_gqa": False,
        "use_moe": False,
    }
    assert read_json_with_comments(TINY) == table
    beyond = ThinkerConfig().model_dump(exclude=set(table))
    assert beyond == {
        "kv_groups": None,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "activation": None,
        "use_qk_norm": False,
        "layer_scale": None,
        "tie_embeddings": False,
        "head_dim": None,
        "norm_eps": 1e-6,
        "balance_loss": 0.01,
        "rope_scaling": None,
    }


def test_size_of_the_tiny_model() -> None:
    """Catches the "about 50 million parameters" that circulates: 1.28 M + 4 × 1.05 M + norms + 1.28 M."""
    assert ThinkerConfig().parameter_counts() == {
        "embedding": 1_280_000,
        "attention": 1_048_576,
        "mlp": 3_145_728,
        "norms": 2_304,
        "head": 1_280_000,
    }
    assert ThinkerConfig().parameter_count() == 6_756_608


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"d_modle": 64}, ["'d_modle'", "unknown", "spelling"]),
        ({"d_model": 250}, ["d_model 250", "n_heads 4", "head_dim"]),
        ({"d_model": 252, "n_heads": 4}, ["head_dim 63", "odd", "change"]),
        ({"head_dim": 65}, ["head_dim 65", "odd", "change"]),
        ({"ctx_len": 0}, ["ctx_len", "0", "greater than or equal to 1"]),
        ({"ctx_len": -5}, ["ctx_len", "-5", "greater than or equal to 1"]),
        ({"use_gqa": True, "kv_groups": 3}, ["n_heads 4", "kv_groups 3", "[1, 2, 4]"]),
        ({"use_gqa": True, "kv_groups": 8}, ["n_heads 4", "kv_groups 8", "[1, 2, 4]"]),
        ({"use_gqa": True, "n_heads": 32, "kv_groups": 0}, ["kv_groups", "0", "greater than or equal to 1"]),
        ({"kv_groups": 2}, ["kv_groups 2", "use_gqa"]),
        ({"use_moe": True, "use_swiglu": False}, ["use_moe", "use_swiglu"]),
        ({"use_moe": True, "num_experts_per_tok": 9}, ["num_experts_per_tok 9", "num_experts 8", "lower"]),
        ({"layer_scale": 0}, ["layer_scale 0", "never trains", "0.1"]),
        ({"activation": "swish"}, ["activation", "'swish'", "silu"]),
        ({"dropout": 1.0}, ["dropout", "1.0", "less than 1"]),
        ({"n_layers": "four"}, ["n_layers", "'four'", "integer"]),
        ({"rope_theta": 0}, ["rope_theta", "0", "greater than 0"]),
        ({"rope_scaling": {"factor": 8}}, ["rope_scaling.original_ctx_len", "required"]),
        (
            {"rope_scaling": {"factor": 8, "original_ctx_len": 64, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["low_freq_factor 4.0", "high_freq_factor 4.0", "less"],
        ),
    ],
)
def test_impossible_values_name_field_value_and_remedy(fields: dict, said: list[str]) -> None:
    """Catches a combination that is only noticed later as a shape error, and a message that takes several lines."""
    with pytest.raises(ValueError, match=r"^config\.json: ") as raised:
        ThinkerConfig.from_mapping(fields, where="config.json")
    message = str(raised.value)
    assert "\n" not in message
    assert [words for words in said if words not in message] == []


def test_two_mistakes_are_both_named() -> None:
    """Catches an error that makes people mend one key at a time."""
    with pytest.raises(ValueError, match=r"c: .*n_layers.*'wrong'"):
        ThinkerConfig.from_mapping({"n_layers": 0, "wrong": 1}, where="c")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", "", '{"d_model": }', "{" * 3000])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    """Catches a traceback of the JSON reader in place of one line that names the file."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json: ") as raised:
        ThinkerConfig.from_json(path)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Catches OSError and UnicodeDecodeError escaping as tracebacks."""
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path / "missing.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
            ThinkerConfig.from_json(path)


def test_there_and_back(config: ThinkerConfig, tmp_path: Path) -> None:
    """Catches a field that is written under another name, or not at all."""
    path = tmp_path / "thinker.json"
    path.write_text(config.to_json())
    assert ThinkerConfig.from_json(path) == config


def test_changed_is_checked_and_leaves_the_original(config: ThinkerConfig) -> None:
    """Catches pydantic's model_copy(update=…), which checks nothing, and a configuration that changes under a model."""
    before = config.model_dump()
    assert config.changed(n_layers=7).n_layers == 7
    with pytest.raises(ValidationError, match="odd"):
        config.changed(head_dim=13)
    with pytest.raises(ValidationError, match="frozen"):
        config.n_layers = 5  # type: ignore[misc]
    assert config.model_dump() == before


def test_defaults_that_depend_on_other_fields() -> None:
    """Catches kv_groups or the activation resolved to a constant."""
    assert ThinkerConfig(use_gqa=True).n_kv_heads == 2
    assert ThinkerConfig(use_gqa=True, n_heads=16).n_kv_heads == 8
    assert ThinkerConfig(use_gqa=True, n_heads=1).n_kv_heads == 1
    assert ThinkerConfig(n_heads=8).n_kv_heads == 8
    assert (ThinkerConfig().head_width, ThinkerConfig(head_dim=80).head_width) == (64, 80)
    assert ThinkerConfig().activation_name == "silu"
    assert ThinkerConfig(use_swiglu=False).activation_name == "gelu"
    assert ThinkerConfig(use_swiglu=False, activation="relu2").activation_name == "relu2"
