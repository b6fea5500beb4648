"""Settings of a run: file, flags, and the line that a mistake gets."""

import json
from pathlib import Path

import pytest

from thinker.config import ThinkerConfig
from thinker.train.config import DEFAULT_MINUTES, TrainConfig, read_settings


def test_a_file_may_hold_both_kinds_of_keys_and_flags_win(tmp_path):
    """Bug: a key is read and never passed on, or a flag's default overrides the file."""
    path = tmp_path / "run.json"
    path.write_text('{"d_model": 128, "n_heads": 2, "lr": 0.01, "minutes": 3, /* why */ "use_gqa": true} // end')
    config, run, given = read_settings(path, {"lr": 0.02, "kv_groups": 1})
    assert (config.d_model, config.n_heads, config.use_gqa, config.kv_groups) == (128, 2, True, 1)
    assert (run.lr, run.minutes, run.batch_size) == (0.02, 3.0, TrainConfig().batch_size)
    assert given == {"d_model", "n_heads", "lr", "minutes", "use_gqa", "kv_groups"}


def test_a_length_on_the_command_line_replaces_the_files():
    """Bug: --steps beside a file's minutes is refused as a contradiction."""
    assert TrainConfig().limit == (None, 60 * DEFAULT_MINUTES)
    assert TrainConfig(steps=5).limit == (5, None)
    assert TrainConfig(minutes=0.5).limit == (None, 30)


@pytest.mark.parametrize("key", ["steps", "minutes"])
def test_length_flags_override_either_key_of_the_file(tmp_path, key):
    """Bug: both lengths survive the merge."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({key: 7}))
    assert read_settings(path, {"steps": 9})[1].limit == (9, None)
    assert read_settings(path, {"minutes": 2.0})[1].limit == (None, 120)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"learning_rate": 1}, ["'learning_rate'", "spelling"]),
        ({"steps": 3, "minutes": 2}, ["steps 3", "minutes 2", "give one"]),
        ({"warmup": 1.5}, ["warmup", "1.5", "less than 1"]),
        ({"n_heads": 4, "use_gqa": True, "kv_groups": 3}, ["n_heads 4", "kv_groups 3", "[1, 2, 4]"]),
        ({"optimizer": "sgd"}, ["optimizer", "'sgd'", "'muon'", "'adamw'"]),
        ({"lr": float("nan")}, ["lr"]),
        ({"data": ["stdlib", ""]}, ["data holds an empty name", "a file or a folder"]),
    ],
)
def test_a_mistake_names_the_field_its_value_and_the_remedy(tmp_path, values, parts):
    """Bug: a traceback, or a message without the field."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:
        read_settings(path, {})
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


def test_a_run_has_a_folder_of_its_own_whatever_its_data(tmp_path, monkeypatch):
    """Bug: with data . or .. the model goes into runs/ itself, or into the folder that its text lies in."""
    (tmp_path / "notes" / "old.v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notes" / "old.v2")
    folders = {data: str(TrainConfig(data=(data,)).folder) for data in (".", "..", "../..", "./", "a/b.txt", "o/set")}
    assert folders == {
        ".": "runs/old",
        "..": "runs/notes",
        "../..": f"runs/{tmp_path.stem}",
        "./": "runs/old",
        "a/b.txt": "runs/b",
        "o/set": "runs/set",
    }
    assert TrainConfig(data=("/",)).folder.parent.name == "runs"
    assert str(TrainConfig(data=(".",), out="mine").folder) == "mine"


def test_home_is_a_persons_own_wherever_a_path_is_given(tmp_path, monkeypatch):
    """Bug: "out": "~/runs" in a file, or --out=~/runs, makes a folder named ~, and --init finds nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.json"
    path.write_text('{"chat": true, "out": "~/runs/x", "init": "~/model", "senses": "~/senses.json"}')
    _, run, _ = read_settings(path, {})
    assert (run.out, run.init, run.senses) == (tmp_path / "runs/x", str(tmp_path / "model"), tmp_path / "senses.json")
    assert read_settings(None, {"out": Path("~/x"), "init": None})[1].folder == tmp_path / "x"


def test_no_key_belongs_to_both():
    """Bug: one name means two things, and a flag sets the wrong one."""
    assert not set(TrainConfig.model_fields) & set(ThinkerConfig.model_fields)


def test_every_preset_can_be_read():
    """Bug: a preset with a key that was renamed."""
    presets = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
    assert len(presets) >= 3
    sizes = {path.stem: read_settings(path, {})[0].parameter_count() for path in presets}
    assert sizes["thinker_tiny"] == 6_756_608
    assert 100e6 < sizes["gpu_12gb"] < 500e6
    assert 10e6 < sizes["cpu_large"] < 100e6
