"""The examples do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file

from thinker import ThinkerConfig, ThinkerLM, Tokenizer
from thinker.checkpoint.publish import Publication, write_view


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
