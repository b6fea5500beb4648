"""The shell, as a person or a script meets it: what goes where, how mistakes are told, and the exit status."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_llm import TOKENIZER, folder_of

from thinker import __version__, load
from thinker.commands import main
from thinker.places import cache_folder
from thinker.train.loop import Diverged

SHELL = [sys.executable, "-c", "from thinker.commands import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return load(folder, backend="torch").generate("a small", max_new_tokens=9)


@pytest.fixture
def shell(capfd, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """shell("generate", …, stdin=b"…"): exit status, stdout, stderr; in this process, as that is faster."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ending:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ending.value.code, out, err

    return run


# generate


def test_only_the_text_goes_to_stdout(shell, folder, text):
    """Catches notices, prompts and a newline too many among the text that a script reads."""
    options = ("--max-new-tokens", 9, "--backend", "torch")
    assert shell("generate", folder, "a small", *options) == (0, text, "")
    status, out, err = shell("generate", folder, "a small", "--ignore-eos", "--backend", "torch")
    assert (status, err.count("\n")) == (0, 1)
    assert "fill ctx_len 48" in err
    assert out.startswith(text)


def test_the_prompt_comes_from_a_pipe_if_it_is_not_given(shell, folder, text):
    """Catches a pipe that is ignored, one that is read though a prompt was given, and echo's newline in the prompt."""
    options = ("--max-new-tokens", 9, "--backend", "torch")
    assert shell("generate", folder, *options, stdin=b"a small\n") == (0, text, "")
    assert shell("generate", folder, *options, stdin=b"a small") == (0, text, "")
    assert shell("generate", folder, "a small", *options, stdin=b"x" * 999) == (0, text, "")
    nothing = load(folder, backend="torch").generate("", max_new_tokens=9)
    assert shell("generate", folder, *options) == (0, nothing, "")
    assert shell("generate", folder, "", *options, stdin=b"a small") == (0, nothing, "")
    none = load(folder, backend="torch").generate("None", max_new_tokens=9)
    assert shell("generate", folder, "None", *options) == (0, none, "")
    dash = load(folder, backend="torch").generate("-5", max_new_tokens=9)
    assert shell("generate", folder, *options, "--", "-5") == (0, dash, "")


def test_every_flag_reaches_the_text(shell, folder):
    """Catches a flag that is accepted and never passed on, and a second --stop that replaces the first."""
    llm = load(folder, backend="torch", ctx_len=40)
    plain = llm.generate("a small", max_new_tokens=20, ignore_eos=True)
    common = ("generate", folder, "a small", "--max-new-tokens", 20, "--backend", "torch")

    def same(*flags, **options):
        expected = llm.generate("a small", max_new_tokens=20, **options)
        assert shell(*common, *flags)[:2] == (0, expected)
        assert expected != plain or "ignore_eos" in options

    same("--ignore-eos", ignore_eos=True)
    same("--echo", "--ignore-eos", echo=True, ignore_eos=True)
    hot = ("--temperature", 2, "--seed", 5)
    same(*hot, temperature=2.0, seed=5)
    same(*hot, "--top-k", 3, temperature=2.0, seed=5, top_k=3)
    same(*hot, "--top-p", 0.3, temperature=2.0, seed=5, top_p=0.3)
    same(*hot, "--min-p", 0.5, temperature=2.0, seed=5, min_p=0.5)
    same("--repetition-penalty", 3, repetition_penalty=3.0)
    first, second = plain[7:10], plain[3:6]
    same("--stop", first, "--stop", second, stop=[first, second])
    assert shell(*common, "--stop", first, "--stop=" + second)[1] == plain[: plain.index(second)]
    assert "fill ctx_len 12" in shell(*common, "--ctx-len", 12, "--ignore-eos")[2]


def test_it_speaks_natively_unless_told_otherwise(shell, folder, text):
    """Catches a default that runs in torch, and a type that is accepted and never passed on."""
    common = ("generate", folder, "a small", "--max-new-tokens", 9, "--json")
    report = json.loads(shell(*common)[1])
    assert (report["decoder"], report["text"]) == ("NativeDecoder", text)
    assert json.loads(shell(*common, "--dtype", "float64")[1])["decoder"] == "TorchDecoder"


def test_generate_reports_as_json(shell, folder, text):
    """Catches a report that isn't JSON, or text beside it."""
    status, out, err = shell("generate", folder, "a small", "--max-new-tokens", 9, "--json", "--backend", "torch")
    report = json.loads(out)
    assert (status, err, report["text"]) == (0, "", text)
    assert (report["new_tokens"], report["finish_reason"], report["context_full"]) == (9, "length", False)
    assert report["prompt_tokens"] == 1 + len(TOKENIZER.encode("a small"))
    assert report["decoder"] == "TorchDecoder"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["nowhere"], b"", "nowhere: no such file or folder"),
        ([], b"", "MODEL"),
        (["{}", "a", "b"], b"", "2 prompts, the second is 'b': put quotes around the whole prompt"),
        (["{}"], b"ok \xff", "stdin: not UTF-8 at byte 3"),
        (["{}", "a", "--temperature", "-1"], b"", "temperature is -1"),
        (["{}", "a", "--temperature", "nan"], b"", "temperature is nan"),
        (["{}", "a", "--top-p", "2"], b"", "top_p is 2"),
        (["{}", "a", "--max-new-tokens", "0"], b"", "max_new_tokens is 0"),
        (["{}", "a", "--max-new-tokens", "many"], b"", "many"),
        (["{}", "a", "--stop", ""], b"", "a stop string is empty"),
        (["{}", "a", "--backend", "gpu"], b"", "gpu"),
        (["{}", "a", "--dtype", "int8", "--backend", "torch"], b"", "dtype is 'int8'"),
        (["{}", "a", "--ctx-len", "0"], b"", "ctx_len is 0"),
        (["{}", "xyz " * 50], b"", "leaves no room for a new one in ctx_len 48"),
        (["{}", "a", "--tempreature", "1"], b"", "--tempreature"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(shell, folder, arguments, stdin, message):
    """Catches a traceback, a mistake that is told in many lines, on stdout, or with status 0."""
    arguments = [argument.replace("{}", str(folder)) for argument in arguments]
    status, out, err = shell("generate", *arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("thinker: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_lack_of_memory_is_one_line_too(shell, folder):
    """Catches the traceback of an allocator, which says nothing of what to do."""
    status, out, err = shell("generate", folder, "a small", "--ctx-len", 10**15, "--backend", "native")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"thinker: out of memory \(.+\): free some, or take a smaller model.*", err.splitlines()[-1])


def test_a_reader_that_leaves_early_is_no_error(folder):
    """Catches a traceback at the end of `thinker generate … | head`."""
    command = [*SHELL, "generate", str(folder), "a", "--ignore-eos"]
    writer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    complaint = writer.stderr.read().decode()
    writer.stderr.close()
    assert (writer.wait(), complaint) == (0, "")


def test_an_interrupt_is_status_130(folder):
    """Catches a traceback at Ctrl-C, a status that a script takes for success, and text that comes only at the end."""
    long = ("--ctx-len", "50000", "--max-new-tokens", "49000", "--ignore-eos")
    command = [*SHELL, "generate", str(folder), "a", *long]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.read(1), "the first letter comes while the others are still to be written"
        writer.send_signal(signal.SIGINT)
        assert b"Traceback" not in writer.stderr.read()
        assert writer.wait() == 130


def test_generating_imports_only_what_it_needs():
    """Catches the seconds that torch, matplotlib or a web server cost at every start."""
    heavy = ("torch", "matplotlib", "jinja2", "transformers", "pyarrow", "fastapi", "rich.progress", "http.client")
    script = f"import sys, thinker.commands.generate; print(*(set({heavy}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


# eval


def test_eval_reports_each_text(shell, folder, tmp_path):
    """Catches a file of which a part is held out, and figures under another text's name."""
    (tmp_path / "one.txt").write_text("Once upon a time there was a small model.\n")
    (tmp_path / "two.md").write_text("a small story " * 20)
    paths = [tmp_path / "one.txt", tmp_path / "two.md"]
    llm = load(folder, backend="torch")
    expected = [llm.evaluate([path.read_text()]) for path in paths]
    status, out, err = shell("eval", folder, "--data", *paths, "--json", "--backend", "torch")
    report = json.loads(out)
    assert (status, err) == (0, "")
    for path, one, result in zip(paths, expected, report["results"], strict=True):
        assert result["data"] == str(path)
        assert result["bytes"] == path.stat().st_size
        assert result["bits_per_byte"] == pytest.approx(one.bits_per_byte, rel=1e-6)
    status, out, err = shell("eval", folder, "--data", *paths, "--backend", "torch")
    assert (status, err, out.count("\n")) == (0, "", 3)
    assert f"{expected[1].bits_per_byte:.4f}" in out.splitlines()[2]


def test_eval_compares_two_types(shell, folder, tmp_path):
    """Catches a second type that is the first once more, and a change of loss against the wrong one."""
    (tmp_path / "one.txt").write_text("Once upon a time there was a small model.\n" * 3)
    wide, narrow = (
        load(folder, backend="torch", dtype=dtype).evaluate([(tmp_path / "one.txt").read_text()])
        for dtype in ("float32", "bfloat16")
    )
    assert wide.loss != narrow.loss
    flags = ("--data", tmp_path / "one.txt", "--backend", "torch", "--compare", "bfloat16")
    _, first, second = shell("eval", folder, *flags)[1].splitlines()
    assert "float32" in first
    assert "loss" not in first
    assert "bfloat16" in second
    assert second.endswith(f"loss {100 * (narrow.loss / wide.loss - 1):+.3f} %")
    results = json.loads(shell("eval", folder, *flags, "--json")[1])["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    assert [result["loss"] for result in results] == [wide.loss, narrow.loss]


def test_eval_s_window_is_set_by_flags(shell, folder, tmp_path):
    """Catches a stride or a context that is accepted and never passed on."""
    (tmp_path / "one.txt").write_text("a small story " * 20)
    llm = load(folder, backend="torch", ctx_len=30)
    expected = llm.evaluate([(tmp_path / "one.txt").read_text()], stride=11)
    flags = ("--ctx-len", 30, "--stride", 11, "--batch", 2, "--json", "--backend", "torch")
    result = json.loads(shell("eval", folder, "--data", tmp_path / "one.txt", *flags)[1])
    assert (result["ctx_len"], result["stride"]) == (30, 11)
    assert result["results"][0]["loss"] == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "x.txt"], "x.txt"),
        (["nowhere", "--data", "{}/ok.txt"], "nowhere: no such file or folder"),
        (["{}"], "--data"),
        (["{}", "--data", "{}/ok.txt", "--stride", "99"], "stride is 99: choose 1 to 48"),
        (["{}", "--data", "{}/ok.txt", "--batch", "0"], "batch"),
        (["{}", "--data", "{}/bad.txt"], "UTF-8"),
        (["{}", "--data", "{}/empty.txt"], "empty.txt"),
        (["{}", "--data", "{}/ok.txt", "--data", "{}/bad.txt"], "--data is given twice: give it once"),
        (["{}", "--data", "stdlib-qa", "--chat", "--stride", "5"], "stride is for texts: drop it with --chat"),
        (["{}", "--data", "stdlib-qa", "--chat", "--batch=8"], "batch is for texts: drop it with --chat"),
    ],
)
def test_eval_s_mistakes_are_one_line_and_status_2(shell, tmp_path, arguments, message):
    """Catches a traceback, figures for a text that could not be read, and flags that are dropped in silence."""
    folder = folder_of(tmp_path / "model")
    (folder / "ok.txt").write_text("some text")
    (folder / "bad.txt").write_bytes(b"some \xff text")
    (folder / "empty.txt").write_text("")
    arguments = [argument.replace("{}", str(folder)) for argument in arguments]
    status, out, err = shell("eval", *arguments, *(["--backend", "torch"] if "{}" in arguments[0] else []))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_texts_are_utf8_whatever_the_locale(folder, monkeypatch, capfd):
    """Catches a text that a terminal of another encoding ends, and bytes of it that are taken for other letters."""

    def run(command: str, *arguments: str, given: bytes = b"") -> tuple[int, bytes, str]:
        said = io.BytesIO()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="cp1252"))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(said, encoding="cp1252"))
        with pytest.raises(SystemExit) as ending:
            main([command, str(folder), *arguments, "--max-new-tokens", "1", "--backend", "torch"])
        return ending.value.code, said.getvalue(), capfd.readouterr().err

    status, out, err = run("generate", "日本", "--echo")
    assert (status, out[:6], err) == (0, "日本".encode(), "")
    assert run("chat", given="日本".encode())[0] == 0  # of which cp1252 lacks a byte
    status, _, err = run("chat", given=b"a \xff\n")
    assert (status, err.count("\n")) == (2, 1)
    assert "the text holds bytes that are no UTF-8" in err


def test_what_is_no_command(shell):
    """Catches a script that goes on behind a misspelt command."""
    status, out, err = shell("genreate")
    assert (status, out) == (2, "")
    assert "unknown command 'genreate': choose among train, generate" in err
    assert shell()[0] == 2
    assert shell("--help")[0] == 0
    assert shell("--version")[:2] == (0, f"{__version__}\n")


# train


@pytest.fixture
def training(tmp_path, monkeypatch) -> list[str]:
    """`train` and the flags of a tiny run in `tmp_path / "run"`; what it caches stays there, but for kernels."""
    kernels = cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "words.txt").write_text("\n".join(f"line {n % 17} has {n % 5} words" for n in range(2000)))
    size = "--vocab-size 300 --n-layers 1 --d-model 32 --n-heads 2 --d-ff 64 --ctx-len 32 --batch-size 4"
    plain = "--precision float32 --compile off --threads 1"
    return ["train", "--data", str(tmp_path / "words.txt"), "--out", str(tmp_path / "run"), *f"{size} {plain}".split()]


def test_training_that_is_ended_saves_and_goes_on(shell, training):
    """Catches a service's end told as success or as a crash, a lost state, and a report that isn't JSON alone."""
    command = [*SHELL, *training, *"--steps 3000 --early-stop 0 --validate-every 1e-6".split()]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as trainer:
        assert trainer.stderr is not None
        assert any("step 1: " in line for line in trainer.stderr), "a first step is done"
        trainer.send_signal(signal.SIGTERM)
        said = trainer.stderr.read()
        assert trainer.wait() == 143
    step = int(re.search(r"Saved at step ([\d,]+)\.", said)[1].replace(",", ""))
    status, out, _ = shell(*training, "--resume", "--steps", step + 2, "--validate-every", 1000, "--json")
    assert (status, json.loads(out)["steps"]) == (0, step + 2)


def test_an_interrupted_training_is_status_130(shell, training, monkeypatch):
    """Catches Ctrl-C that a script takes for the end of the run, or for a service's."""
    monkeypatch.setattr("thinker.train.loop.fit", lambda run, watcher: run.save() or signal.SIGINT)
    status, out, err = shell(*training, "--steps", 2)
    assert (status, out) == (130, "")
    assert "Saved at step 0. To go on: thinker train --resume --out" in err


def test_a_training_that_diverges_is_status_1(shell, training, monkeypatch):
    """Catches divergence told as success, as a user's mistake, or in a traceback."""

    def fit(run, watcher):
        raise Diverged("step 1: the loss is nan")

    monkeypatch.setattr("thinker.train.loop.fit", fit)
    status, out, err = shell(*training, "--steps", 2)
    assert (status, out) == (1, "")
    assert "stopped: step 1: the loss is nan" in err


def test_closed_and_full_streams_are_no_traceback(folder):
    """Catches a service without stderr that can't speak, and a traceback where the disk is full."""

    def run(redirected: str) -> tuple[int, str]:
        command = f"exec {' '.join(map(shlex.quote, SHELL))} generate {folder} a --max-new-tokens 3 {redirected}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, input="")
        return done.returncode, done.stdout + done.stderr

    status, text = run("")
    assert (status, bool(text)) == (0, True)
    assert run("2>&-") == run("<&-") == (0, text)
    assert run(">&-") == (0, "")
    if Path("/dev/full").exists():
        assert run(">/dev/full") == (1, "thinker: No space left on device\n")


def test_a_path_that_cannot_be_is_one_line(shell):
    """Catches a traceback for a prompt that stands where the model belongs."""
    status, _, err = shell("generate", "x" * 300, "a")
    assert status == 2
    assert re.fullmatch(r"thinker: x+: File name too long\n", err)
