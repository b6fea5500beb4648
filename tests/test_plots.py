"""Pictures for people: what stands on them can be read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from thinker.plots import Example, Shown, answered

RNG = np.random.default_rng(0)
PICTURE = Shown("image", RNG.integers(0, 256, (8, 8), dtype=np.uint8), RNG.random((2, 2)))
SOUND = Shown("audio", RNG.normal(size=(20, 12)).astype(np.float32), RNG.random(5))
LONG = Example([PICTURE], "Please say in whole sentences what it is. " * 4, "It is an owl. " * 9, "I see a cat. " * 9)


def drawn(path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that was saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *arguments: Any) -> None:
        figures.append(figure)
        save(figure, *arguments)

    monkeypatch.setattr(Figure, "savefig", saved)
    answered(path, examples)
    assert path.read_bytes()[:4] == b"\x89PNG"
    return figures[0]


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_long_texts_stay_in_their_columns(tmp_path, monkeypatch, columns):
    """Catches a heading cut off at both sides, and answers printed over their neighbours."""
    figure = drawn(tmp_path / "x.png", [LONG] * columns, monkeypatch)
    boxes = [text.get_window_extent() for text in (figure._suptitle, *(axes.xaxis.label for axes in figure.axes))]
    assert len(boxes) == 1 + columns
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes[1:]))
    assert all(axes.get_window_extent().height > 100 for axes in figure.axes)


def test_any_text_is_drawn_and_nothing_else_is_said(tmp_path, monkeypatch, caplog):
    """Catches dollar signs read as a formula, and a warning for each Chinese letter, or each font that is not here."""
    texts = ["$x_$ or $5^$?", "这是什么数字？", "".join(map(chr, range(32))), ""]
    figure = drawn(tmp_path / "x.png", [Example([PICTURE], text, text, text) for text in texts], monkeypatch)
    assert figure.axes[0].get_xlabel() == "$x_$ or $5^$?\n$x_$ or $5^$?"
    assert not caplog.records


def test_it_is_said_what_was_given(tmp_path, monkeypatch):
    """Catches features of a picture that are shown as an empty recording."""
    weights = np.array([0.1, 0.4, 0.2])
    given = [PICTURE, SOUND, Shown("image", None, weights), Shown("audio", None, weights[:1])]
    figure = drawn(tmp_path / "x.png", [Example([one], "?", "a", "a") for one in given], monkeypatch)
    assert [axes.get_title() for axes in figure.axes] == [
        "picture",
        "recording, pitch over time",
        "picture, as features",
        "recording, as features",
    ]
    assert [bar.get_height() for bar in figure.axes[2].patches] == weights.tolist()
