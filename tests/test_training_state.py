"""Proofs of the exact state: nothing is lost or changed, and a kill at any moment leaves a whole one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small

from thinker.checkpoint import files
from thinker.checkpoint.training import latest, load, save
from thinker.config import ThinkerConfig
from thinker.formats.tensors import parameter_shapes


def parameters(config: ThinkerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(seed)
    shapes = parameter_shapes(config)
    return {name: draws.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def state(config: ThinkerConfig, **decisions: Any) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json"), **decisions}


def save_step(run: Path, step: int, **options: Any) -> Path:
    config = small("dense")
    return save(run, step, parameters(config, step), {"m": np.full(3, step, np.float32)}, state(config), **options)


def test_comes_back_bit_for_bit(tmp_path: Path, config: ThinkerConfig) -> None:
    """Catches folding or casting in the exact state, a lost tensor, and a decision that JSON changes."""
    values = parameters(config)
    optimizer = {"tok_emb.weight.exp_avg": values["tok_emb.weight"] * 2, "step": np.array(7, np.int64)}
    decisions = {"precision": "bfloat16", "threads": 2, "seed": 2**60 + 1, "nested": {"lr": 0.1, "none": None}}
    path = save(tmp_path, 1200, values, optimizer, state(config, **decisions), tokenizer_json='{"é": 1}\n')
    assert path == tmp_path / "training" / "step-00001200"
    found = load(path)
    assert (found.step, found.config, found.tokenizer_json) == (1200, config, '{"é": 1}\n')
    assert found.state == state(config, **decisions)
    for kept, given in ((found.parameters, values), (found.optimizer, optimizer)):
        assert set(kept) == set(given)
        for name, array in given.items():
            assert kept[name].dtype == array.dtype
            assert kept[name].tobytes() == array.tobytes(), name


def test_names_of_files_that_are_no_text_come_back(tmp_path: Path) -> None:
    """Catches a run that is lost at its first save, because a byte in the name of its data is no UTF-8."""
    name = "caf\udce9 中.txt"
    config = small("dense")
    path = save(tmp_path, 1, parameters(config), {}, {**state(config), "data": name})
    assert load(path).state["data"] == name
    assert "\\udce9 中" in (path / "state.json").read_text(encoding="utf-8")
    assert json.loads(files.to_json({"data": name}).encode()) == {"data": name}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Catches steps ordered as text, too many kept, and the newest deleted in place of the oldest."""
    for step in (3, 90, 1000, 99_999_999, 123_456_789):
        save_step(tmp_path, step)
    newest = latest(tmp_path)
    assert newest is not None
    assert load(newest).step == 123_456_789
    assert sorted(os.listdir(tmp_path / "training")) == ["step-123456789", "step-99999999"]
    save_step(tmp_path, 123_456_790, keep=1)
    assert os.listdir(tmp_path / "training") == ["step-123456790"]


def test_the_same_step_again_gets_a_fresh_name(tmp_path: Path) -> None:
    """Catches a rename over a folder that has something in it, which the system refuses."""
    paths = [save_step(tmp_path, 5, keep=20) for _ in range(12)]
    assert paths[0].name == "step-00000005"
    assert paths[11].name == "step-00000005.11"
    assert latest(tmp_path) == paths[11], "11 comes after 9"


def test_an_older_step_does_not_hide_behind_a_newer_one(tmp_path: Path) -> None:
    """Catches a run saved into another's folder, whose state would never be found again."""
    save_step(tmp_path, 100)
    with pytest.raises(ValueError, match="holds step 100, later than step 50"):
        save_step(tmp_path, 50)
    assert os.listdir(tmp_path / "training") == ["step-00000100"]


def test_nothing_to_find(tmp_path: Path) -> None:
    """Catches a crash where there is no run yet, and temporary names taken for finished ones."""
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None
    path = save_step(tmp_path, 5)
    path.rename(path.with_name(".step-00000005.abcd.tmp"))
    (path.parent / "step-00000009").write_text("a file")
    (path.parent / "step-5").mkdir()
    assert latest(tmp_path) is None


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_state_is_passed_over_and_kept(tmp_path: Path, name: str, damage: str) -> None:
    """Catches resuming from half a state, and deleting one that a passing trouble of the disk made unreadable."""
    old, new = save_step(tmp_path, 1), save_step(tmp_path, 2)
    content = (new / name).read_bytes()
    if damage == "missing":
        (new / name).unlink()
    else:
        (new / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert latest(tmp_path) == old
    with pytest.raises(ValueError, match=name):
        load(new)
    save_step(tmp_path, 3, keep=1)
    assert new.exists()
    assert not old.exists()


def test_states_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    """Catches files of two steps mixed in one folder, and parameters that are not the architecture's."""
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    shutil.copy(first / "optimizer.safetensors", second)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: belongs to step 1"):
        load(second)
    values = json.loads((first / "state.json").read_text())
    for change, reason in (
        ({"config": values["config"] | {"d_ff": 96}}, r"gate_proj\.weight has shape \[48, 32\].*\[96, 32\]"),
        ({"config": values["config"] | {"n_layers": 4}}, "missing"),
        ({"config": values["config"] | {"n_layers": 10**12}}, "too few for 1000000000000 layers"),
        ({"config": values["config"] | {"unknown": 1}}, "unknown key"),
        ({"config": None}, "no config"),
        ({"step": -1}, "no step"),
        ({"step": True}, "no step"),
    ):
        (first / "state.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=reason):
            load(first)


@pytest.mark.parametrize("trouble", ["nan", "float16", "missing", "unexpected", "shape"])
def test_a_bad_model_does_not_replace_a_good_one(tmp_path: Path, trouble: str) -> None:
    """Catches a diverged or incomplete model saved over the last good checkpoint."""
    good = save_step(tmp_path, 1)
    config = small("dense")
    values, name = parameters(config), "blocks.1.attn.qkv.weight"
    if trouble == "nan":
        values[name][0, 0] = np.nan
    elif trouble == "float16":
        values[name] = values[name].astype(np.float16)
    elif trouble == "missing":
        del values[name]
    elif trouble == "unexpected":
        values[name + "x"] = values[name]
    else:
        values[name] = values[name][:-1]
    with pytest.raises(ValueError, match=r"qkv\.weight"):
        save(tmp_path, 2, values, {}, state(config))
    assert os.listdir(tmp_path / "training") == [good.name]
    assert latest(tmp_path) == good


@pytest.mark.parametrize("operation", ["fsync", "rename", "replace"])
def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Catches half a state left behind, or the old one gone, when any sync or rename fails."""
    save_step(tmp_path, 1)
    real, calls, fail_at = getattr(os, operation), 0, 0

    def sometimes(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(files.os, operation, sometimes)
    for fail_at in range(1, 40):
        calls = 0
        try:
            save_step(tmp_path, 1 + fail_at)
        except OSError:
            newest = latest(tmp_path)
            assert newest is not None
            assert load(newest).step <= 1 + fail_at
            assert not list((tmp_path / "training").glob(".*.tmp"))
        else:
            break
    assert fail_at > 1, "no call failed: the test doesn't reach what it is about"
    newest = latest(tmp_path)
    assert newest is not None
    assert load(newest).step == 1 + fail_at


KILL = """
import os, sys, shutil
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_training_state import parameters, save_step, small
from thinker.checkpoint.training import latest, load

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
base = Path(sys.argv[1])
kills = 0
while True:
    run = base / str(kills)
    save_step(run, 1)
    save_step(run, 2)
    child = os.fork()
    if child == 0:
        left = kills
        def hook(event, arguments):
            global left
            if event in OPERATIONS and str(run) in str(arguments[0]):
                if left == 0:
                    os._exit(9)  # as a kill would: no handler runs, nothing is cleaned up
                left -= 1
        sys.addaudithook(hook)
        save_step(run, 3)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = latest(run)
    assert newest is not None, f"killed before operation {kills}: nothing is left"
    found = load(newest)
    assert found.step in (2, 3), found.step
    for name, array in parameters(small("dense"), found.step).items():
        assert found.parameters[name].tobytes() == array.tobytes(), name
    assert found.optimizer["m"].tolist() == [found.step] * 3
    save_step(run, 4)
    assert load(latest(run)).step == 4
    shutil.rmtree(run)
    if not killed:
        assert found.step == 3
        break
    kills += 1
print(kills)
"""


@pytest.mark.skipif(os.name == "nt", reason="fork is a thing of POSIX")
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    """Catches an order of file operations in which a kill loses the run: a process is killed before each in turn."""
    command = [sys.executable, "-c", KILL, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 15, "too few file operations were seen for the proof to mean anything"
