"""What a person sees of a run, and what it leaves in files."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from thinker.config import ThinkerConfig
from thinker.train import summary
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable
from thinker.train.loop import fit
from thinker.train.report import Reporter, held_out_loss, kept_metrics, one_line
from thinker.train.run import Best, Run
from thinker.train.start import begin, resume
from thinker.train.summary import beginning, summarise, xz_bits_per_byte

ARCHITECTURE = ThinkerConfig(vocab_size=300, n_layers=1, d_model=32, n_heads=2, d_ff=64, ctx_len=32, dropout=0.1)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"line {n % 17} has {n % 5} words" for n in range(2000)))
    return TrainConfig(
        data=(str(path),),
        out=tmp_path / "run",
        steps=4,
        batch_size=4,
        precision="float32",
        compile="off",
        validate_every=1e-6,
    )


def console():
    return Console(file=io.StringIO(), width=100, highlight=False)


def trained(settings, shown):
    with repeatable(None):
        run = begin(ARCHITECTURE, settings, set(), lambda line: None)
        with Reporter(run, shown) as reporter:
            fit(run, reporter)
    return run, reporter


def test_a_run_leaves_metrics_a_picture_and_a_report(settings):
    """Bug: the report describes other text than the held-out one, or the picture can't be drawn from the metrics."""
    shown = console()
    run, reporter = trained(settings, shown)
    report = summarise(run, reporter.rows, shown, 1.0)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [1, 2, 3, 4]
    assert rows == reporter.rows
    assert (run.folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert all(len(text) > 20 for text in report["continuations"]), "a context of 32 tokens leaves room to go on in"
    assert report["held_out_bytes"] == run.corpus.valid_bytes
    assert report["steps"] == 4
    text = shown.file.getvalue()
    for expected in ("bits per byte", "xz -9", "continuation 1", "thinker generate", "thinker eval"):
        assert expected in text
    assert max(len(line) for line in text.splitlines() if "step 2:" in line) <= 100, "a look takes one line"


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_the_report_is_of_the_text_that_was_held_out(settings, change):
    """Bug: a file edited while training is measured with text that was trained on; a removed one leaves no report."""
    run, reporter = trained(settings, console())
    expected = summarise(run, reporter.rows, console(), 1.0)
    (path,) = map(Path, settings.data)
    if change == "edited":
        path.write_text("\n".join(reversed(path.read_text().splitlines())) * 2)
    else:
        path.unlink()
    assert summarise(run, reporter.rows, console(), 1.0) == expected


def test_a_run_may_lie_in_the_folder_that_it_learns(settings):
    """Bug: its own metrics are read as text, which they aren't, and refused: no run begins or goes on there again."""
    folder = settings.out / "notes"
    folder.mkdir(parents=True)
    Path(settings.data[0]).rename(folder / "words.txt")
    inside = settings.changed(data=(str(folder),), out=folder / "run")
    run, _ = trained(inside, console())
    assert (run.folder / "metrics.jsonl").stat().st_size
    with repeatable(None):
        again = begin(ARCHITECTURE, inside.changed(out=folder / "another"), set(), lambda line: None)
        assert again.corpus.fingerprint == run.corpus.fingerprint
        assert resume(ARCHITECTURE, inside.changed(steps=9), {"steps"}, lambda line: None).step == 4


def test_metrics_of_steps_that_a_kill_undid_are_dropped(settings):
    """Bug: after a resume the log holds some steps twice, and the curve runs backwards."""
    run, _ = trained(settings, console())
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'5\n{"loss": 1.0}\n\xff\n{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    assert {row["step"] for row in kept_metrics(path, 4)} == {1, 2, 3, 4}
    with repeatable(None):
        longer = resume(ARCHITECTURE, settings.changed(steps=6), {"steps"}, lambda line: None)
        with Reporter(longer, console()) as reporter:
            fit(longer, reporter)
    steps = [row["step"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_curve_ends_where_the_published_state_is(settings, monkeypatch):
    """Bug: the loss of the best state is drawn at the last step, as if the run had ended there with it."""
    run, _ = trained(settings, console())
    run.best = Best(2, 1.0)
    drawn = []
    monkeypatch.setattr(summary, "loss_curve", lambda path, steps, losses, looks, yardstick: drawn.extend(looks))
    rows = [{"step": step, "held_out_bits_per_byte": 3.0} for step in (1, 2, 3)]
    report = summarise(run, rows, console(), 1.0)
    assert drawn == [(1, 3.0), (2, report["held_out_bits_per_byte"]), (3, 3.0)]
    assert (report["steps"], report["published_step"]) == (4, 2)


def test_metrics_are_never_behind_a_saved_state(settings, monkeypatch):
    """Bug: a kill while a state is published leaves it without the lines of its steps, and the curve has a gap."""
    lines = []
    save = Run.save

    def saved(run):
        save(run)
        rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        lines.append([row["step"] for row in rows if "loss" in row])

    monkeypatch.setattr(Run, "save", saved)
    trained(settings.changed(save_every=1e-9), console())
    assert lines == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_looking_does_not_steer(settings, tmp_path):
    """Bug: a sample or a validation draws from the generator that dropout uses, or leaves the model in eval mode."""
    looked, _ = trained(settings, console())
    blind, _ = trained(settings.changed(out=tmp_path / "blind", validate_every=1e9), console())
    for (name, a), b in zip(looked.model.named_parameters(), blind.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert looked.model.training


def test_held_out_loss_is_that_of_a_uniform_guess_before_training(settings):
    """Bug: the mean is over windows instead of tokens, or the padding of the last window counts."""
    with repeatable(None):
        run = begin(ARCHITECTURE, settings.changed(cooccurrence=0), set(), lambda line: None)
    assert held_out_loss(run) == pytest.approx(torch.log(torch.tensor(float(run.config.vocab_size))).item(), rel=1e-5)


def test_xz_yardstick_is_xzs(settings):
    """Bug: the yardstick compresses other bytes than those that the model is measured on."""
    import lzma

    with repeatable(None):
        run = begin(ARCHITECTURE, settings, set(), lambda line: None)
    text = b"".join(run.corpus.valid_text())
    assert len(text) == run.corpus.valid_bytes
    assert xz_bits_per_byte(run.corpus) == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_tensorboard_files_are_written_behind_the_flag(settings):
    """Bug: the flag is read and never passed on."""
    run, _ = trained(settings.changed(tensorboard=True), console())
    assert list((run.folder / "tensorboard").glob("events.*"))


def test_texts_in_one_line_and_beginnings():
    """Bug: a newline in a sample breaks the display; a prompt ends in a space that no token begins with."""
    assert one_line("a\n  b") == "a ⏎ b"
    assert beginning("short") == "short"
    long = "word " * 40
    assert long.startswith(beginning(long))
    assert not beginning(long).endswith(" ")


def test_a_prompt_that_leaves_no_room_is_refused_before_training(settings):
    """Bug: the first look, minutes later, ends the run."""
    with pytest.raises(ValueError, match=r"prompt: has \d+ tokens, which leaves no room in ctx_len 32"):
        begin(ARCHITECTURE, settings.changed(prompt="line 9 has 4 words\n" * 9), set(), lambda line: None)
