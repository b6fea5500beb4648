"""Proofs of the published view: it is the exact state's function, whole after a kill, and honest about its step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import randomise, small
from test_training_state import parameters, state

from thinker.checkpoint.publish import Publication, open_run, publish, repair
from thinker.checkpoint.reader import read_safetensors
from thinker.checkpoint.training import save
from thinker.config import ThinkerConfig
from thinker.formats import ModelFiles, open_model
from thinker.formats.huggingface_config import disagreement
from thinker.model import ThinkerLM
from thinker.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return Tokenizer.train(["some words to learn, and some words again"] * 3, 300).to_json()


def run_with(run: Path, config: ThinkerConfig, step: int, tokenizer: str | None = None, **publication: Any) -> Path:
    """A run with one exact state of random parameters, published."""
    given = {"publication": Publication(**publication).to_json()}
    save(run, step, parameters(config, step), {}, state(config, **given), tokenizer_json=tokenizer)
    publish(run)
    return run


def as_model(files: ModelFiles) -> ThinkerLM:
    model = ThinkerLM(files.config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(np.array(files.tensors[name], np.float32))
    return model.eval().double()


def test_opens_as_it_was(tmp_path: Path, config: ThinkerConfig) -> None:
    """Catches a tensor misnamed, cut at the wrong row or joined in the wrong order on the way out and in."""
    files = open_model(run_with(tmp_path, config, 3))
    assert disagreement(files.config, config.changed(layer_scale=None)) is None
    assert files.config.dropout == config.dropout
    assert (files.step, files.dtype, files.tokenizer_json) == (3, "float32", None)
    if config.layer_scale is None:
        values = parameters(config, 3)
        assert set(files.tensors) == set(values)
        for name, array in values.items():
            assert files.tensors[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("config", ["layer_scale", "everything"], indirect=True)
def test_folding_keeps_the_function(tmp_path: Path, config: ThinkerConfig) -> None:
    """Catches a scale folded into columns instead of rows, into the wrong branch, or into one expert only."""
    model = randomise(ThinkerLM(config))
    values = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    save(tmp_path, 1, values, {}, state(config))
    publish(tmp_path)
    files = open_model(tmp_path)
    assert files.config.layer_scale is None
    tokens = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.double()(tokens), as_model(files)(tokens)
    # Folded products are rounded to float32 once: half an ulp (6e-8) of each weight, over some ten layers.
    assert torch.allclose(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    own = json.loads((tmp_path / "thinker.json").read_text())
    assert own["config"]["layer_scale"] is None


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", np.dtype(ml_dtypes.bfloat16)), ("float16", np.dtype(np.float16))]
)
def test_casts_on_publishing_only(tmp_path: Path, dtype: str, kind: np.dtype[Any]) -> None:
    """Catches a type that the files and their descriptions don't agree on."""
    config = small("moe")
    files = open_model(run_with(tmp_path, config, 1, dtype=dtype))
    assert files.dtype == dtype
    for name, array in parameters(config, 1).items():
        assert files.tensors[name].tobytes() == array.astype(kind).tobytes()
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == dtype


def test_every_file_carries_its_step(tmp_path: Path, tokenizer_json: str) -> None:
    """Catches a file whose age can't be told after a kill, and text files that don't say what was decided."""
    run = run_with(
        tmp_path,
        small("dense", vocab_size=300),
        7,
        tokenizer_json,
        bos_id=1,
        eos_ids=(2, 6),
        pad_id=0,
        add_bos=True,
        chat_template="{{ messages }}",
    )
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "thinker.json"):
        assert json.loads((run / name).read_text())["thinker_step"] == 7, name
    assert read_safetensors(run / "model.safetensors").metadata == {"format": "pt", "step": "7"}
    files = open_model(run)
    assert (files.bos_id, files.eos_ids, files.pad_id, files.add_bos) == (1, (2, 6), 0, True)
    assert files.chat_template == "{{ messages }}"
    assert files.tokenizer_json is not None
    assert Tokenizer.from_json(files.tokenizer_json).encode("words") == Tokenizer.from_json(tokenizer_json).encode(
        "words"
    ), "the bos that others put in front got into Thinker's own encoding"


def test_publishing_twice_changes_nothing(tmp_path: Path, tokenizer_json: str) -> None:
    """Catches a view that depends on what was there before, or on the time."""
    config = small("moe_gqa_qk_norm", vocab_size=300)
    run = run_with(tmp_path, config, 7, tokenizer_json, bos_id=1, add_bos=True)
    names = [name for name in os.listdir(run) if name != "training"]
    before = {name: (run / name).read_bytes() for name in names}
    publish(run)
    assert {name: (run / name).read_bytes() for name in os.listdir(run) if name != "training"} == before


def test_thinkers_own_architecture_says_so(tmp_path: Path) -> None:
    """Catches the plain MLP with QK-norm published under a class that would compute something else."""
    config = small("plain_mlp", use_qk_norm=True)
    run = run_with(tmp_path, config, 1)
    values = json.loads((run / "config.json").read_text())
    assert values["architectures"] == ["ThinkerForCausalLM"]
    assert "no Hugging Face class" in json.loads((run / "thinker.json").read_text())["only_thinker_because"]
    for gone in ((), ("thinker.json",)):
        for name in gone:
            (run / name).unlink()
        assert disagreement(open_model(run).config, config) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json", "thinker.json"]
)
def test_a_view_of_two_steps_is_repaired_or_refused(tmp_path: Path, tokenizer_json: str, name: str) -> None:
    """Catches weights of one step read with the description of another."""
    config, options = small("dense", vocab_size=300), {"bos_id": 1, "eos_ids": (2,), "pad_id": 0}
    run = run_with(tmp_path / "run", config, 1, tokenizer_json, **options)
    old = (run / name).read_bytes()
    run_with(run, config, 2, tokenizer_json, **options)
    (run / name).write_bytes(old)
    (run / "training").rename(tmp_path / "training")
    with pytest.raises(ValueError, match=r"of step 2.*of step 1|of step 1.*of step 2"):
        open_model(run)
    (tmp_path / "training").rename(run / "training")
    files = open_model(run)
    assert files.step == 2
    assert np.array_equal(files.tensors["norm.scale"], parameters(config, 2)["norm.scale"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "thinker.json"])
def test_a_missing_file_is_made_again_or_named(tmp_path: Path, name: str) -> None:
    """Catches a run killed before its first view, which has everything but can't be opened."""
    run = run_with(tmp_path / "run", small("dense"), 1)
    (run / name).unlink()
    assert open_model(run).step == 1
    (run / name).unlink()
    (run / "training").rename(tmp_path / "training")
    if name == "thinker.json":
        assert open_model(run).step is None, "without it the folder is a Hugging Face model like any other"
        return
    with pytest.raises(ValueError, match=f"{name} is missing"):
        open_model(run)


def test_opening_brings_the_view_up_to_the_state_to_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kill between saving and publishing after which the view stays behind for good."""
    config = small("dense")
    assert repair(tmp_path) is False
    run = run_with(tmp_path, config, 1)
    assert repair(run) is False
    save(run, 2, parameters(config, 2), {}, state(config))

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("thinker.checkpoint.publish.write_safetensors", refuse)
        assert open_run(run).step == 1, "a whole view is read where it can't be replaced"
    assert open_run(run).step == 2
    assert repair(run) is False


def test_opening_never_replaces_a_view_whose_state_is_gone(tmp_path: Path) -> None:
    """Catches the only copy of the best weights, or of the last ones, replaced by others when it is opened."""
    config = small("dense")
    run = run_with(tmp_path, config, 1)
    given = {"best": {"step": 3, "loss": 1.0, "looks_since": 0}, "publication": Publication().to_json()}
    for step in (3, 4):
        save(run, step, parameters(config, step), {}, state(config, **given))
        publish(run)
    for gone, opened in ((3, 3), (4, 3)):
        shutil.rmtree(run / "training" / f"step-{gone:08d}")
        assert open_run(run).step == opened


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_foreign_weights_are_never_replaced(tmp_path: Path, name: str) -> None:
    """Catches the repair, or a run that goes on, overwriting or hiding what another program trained further."""
    import safetensors.numpy

    run = run_with(tmp_path, small("dense"), 1)
    weights = run / "model.safetensors"
    values = {key: value + 1 for key, value in safetensors.numpy.load_file(weights).items()}
    if name != weights.name:
        weights.unlink()
        weights = run / "model-00001-of-00001.safetensors"
        (run / name).write_text(json.dumps({"weight_map": dict.fromkeys(values, weights.name)}))
    safetensors.numpy.save_file(values, weights, {"format": "pt"})
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=rf"{name}: was not written by Thinker.*delete thinker\.json"):
        open_model(run)
    (run / "thinker.json").unlink()
    del before[run / "thinker.json"]
    files = open_model(run)
    assert files.step is None, "as the message says"
    assert np.array_equal(files.tensors["norm.scale"], parameters(small("dense"), 1)["norm.scale"] + 1)
    for make in (publish, repair, open_run):
        with pytest.raises(ValueError, match=rf"{name}: was not written by Thinker and stays"):
            make(run)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_theta": 5.0, "rope_parameters": None}, "rope_theta 10000.0 and 5.0"),
        ({"hidden_act": "relu"}, "activation_name silu and relu"),
        ({"rms_norm_eps": 1e-5}, "norm_eps"),
        ({"max_position_embeddings": 96}, "ctx_len 48 and 96"),
    ],
)
def test_two_descriptions_that_disagree_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """Catches an edited config.json that Thinker would ignore and every other program believe."""
    run = run_with(tmp_path, small("dense"), 1)
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=f"disagree: {reason}"):
        open_model(run)


def test_impossible_publications_are_refused(tmp_path: Path, tokenizer_json: str) -> None:
    """Catches special tokens that the tokenizer doesn't have, and types that can't be written."""
    for fields, reason in (({"dtype": "int8"}, "int8"), ({"add_bos": True}, "bos_id")):
        with pytest.raises(ValueError, match=reason):
            Publication(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown keys"):
        Publication.from_json({"x": 1}, "here")
    with pytest.raises(ValueError, match="has no id 333"):
        run_with(tmp_path, small("dense", vocab_size=400), 1, tokenizer_json, bos_id=333)
    assert os.listdir(tmp_path) == ["training"], "something was written before the refusal"
    with pytest.raises(ValueError, match="no whole state"):
        publish(tmp_path / "none")


KILL = """
import os, sys, shutil
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_publish import parameters, publish, run_with, save, small, state, open_model, Publication, Tokenizer

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove")
tokenizer = Tokenizer.train(["some words"], 300).to_json()
config, base, kills = small("dense", vocab_size=300), Path(sys.argv[1]), 0
while True:
    run = base / str(kills)
    run_with(run, config, 1, tokenizer, bos_id=1, eos_ids=(2,))
    given = {"publication": Publication(bos_id=1, eos_ids=(2,)).to_json()}
    save(run, 2, parameters(config, 2), {}, state(config, **given), tokenizer_json=tokenizer)
    child = os.fork()
    if child == 0:
        left = kills
        def hook(event, arguments):
            global left
            if event in OPERATIONS and str(run) in str(arguments[0]):
                if left == 0:
                    os._exit(9)
                left -= 1
        sys.addaudithook(hook)
        publish(run)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    files = open_model(run)
    assert files.step in (1, 2)
    for name, array in parameters(config, files.step).items():
        assert files.tensors[name].tobytes() == array.tobytes(), name
    assert files.tokenizer_json is not None and files.eos_ids == (2,)
    shutil.rmtree(run)
    if not killed:
        assert files.step == 2
        break
    kills += 1
print(kills)
"""


@pytest.mark.skipif(os.name == "nt", reason="fork is a thing of POSIX")
def test_a_kill_at_any_moment_leaves_a_view_that_opens(tmp_path: Path) -> None:
    """Catches an order of replacements after which files of two steps look like one view."""
    command = [sys.executable, "-c", KILL, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 15, "too few file operations were seen for the proof to mean anything"
