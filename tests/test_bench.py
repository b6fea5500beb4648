"""`thinker bench` and the machinery of benchmarks/: formulas, limits, turns, tables. No speed is asserted anywhere."""

import ast
import importlib
import inspect
import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, small
from matplotlib.figure import Figure as MatplotlibFigure
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import thinker
from benchmarks import decode, growth, results, train_step, turns
from benchmarks.contestants import limit, tutorial
from benchmarks.contestants.plain_loop import TrainingShape
from benchmarks.results import Figure, Line, Match, Target
from benchmarks.turns import Contestant, Died, Meeting, Result, Turn
from thinker.bench import costs, limits, report, speed
from thinker.cache import KVCache
from thinker.commands import bench as command
from thinker.config import ThinkerConfig
from thinker.decode import native
from thinker.decode.torch_decoder import TorchDecoder
from thinker.model import ThinkerLM
from thinker.trace import trace
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable

ROOT = Path(__file__).resolve().parents[1]
TINY = ThinkerConfig()
MATCHES = (*train_step.MATCHES, *decode.MATCHES, *growth.MATCHES)


# Costs


def test_costs_of_the_tiny_model_by_hand() -> None:
    """Catches a wrong factor in what every share and limit is computed from."""
    blocks = 4 * (4 * 256 * 256 + 3 * 256 * 1024)  # q, k, v, out; gate, up, down
    assert costs.matrix_weights(TINY) == blocks + 5000 * 256 == 5_474_304
    # Forward and backward, 6 operations a weight; scores and sums over 256.5 keys on average, 2 operations each.
    attention = 4 * 3 * (2 + 2) * 256.5 * 256
    assert costs.training_flops(TINY, 512) == 6 * 5_474_304 + attention
    assert round(costs.training_flops(TINY, 512) / 1e6) == 36
    assert costs.decode_bytes(TINY, "float32", 1, 0) == 4 * 5_474_304  # 21.9 MB
    # A byte each, 5.5 MB, and the blocks' scales.
    assert costs.decode_bytes(TINY, "int8", 1, 0) == 5_474_304 + 2 * 5_474_304 / 32
    assert costs.cache_bytes(TINY, "float32") == 2 * costs.cache_bytes(TINY, "int8") == 4 * 2 * 256 * 4
    assert costs.decode_bytes(TINY, "float32", 3, 100) == 4 * 5_474_304 + 3 * 100 * 8192


@pytest.mark.parametrize("name", ["dense", "gqa", "one_group", "qk_norm", "plain_mlp", "tied", "wide_heads"])
def test_costs_equal_what_torch_counts(name: str) -> None:
    """Catches a matrix that is forgotten or counted twice in one of the architectures."""
    config, T = small(name, dropout=0.0), 16
    model = ThinkerLM(config).eval()
    counter = FlopCounterMode(display=False)
    with counter:
        trace(model, torch.zeros(1, T, dtype=torch.long))  # in which attention is made of products that torch counts
    # The whole square of scores, so that every token sees all T.
    expected = T * (2 * costs.matrix_weights(config) + costs.attention_flops(config, T))
    assert counter.get_total_flops() == expected
    cache = KVCache.empty(config, 1, device=torch.device("cpu"), dtype=torch.float32)
    assert cache.keys.nbytes + cache.values.nbytes == costs.cache_bytes(config, "float32") * config.ctx_len


def test_prefill_needs_logits_for_the_last_token_only() -> None:
    """Catches a limit for prefill that counts the head for every token."""
    one = costs.decode_flops(TINY, 1)
    assert costs.prefill_flops(TINY, 1) == one
    two = costs.prefill_flops(TINY, 2)
    assert two == one + costs.decode_flops(TINY, 2) - 2 * 256 * 5000


def test_a_mixture_costs_what_is_chosen() -> None:
    """Catches counting all experts' operations, or too few of their bytes once many streams choose."""
    config = TINY.changed(use_moe=True, num_experts=8, num_experts_per_tok=2, d_ff=512)
    expert = 3 * 256 * 512
    assert costs.matrix_weights(config) == 4 * (4 * 256 * 256 + 2 * expert + 256 * 8) + 5000 * 256
    assert costs.weights_read(config, 1) == costs.matrix_weights(config)
    everything = config.parameter_count() - 5000 * 256 - 9 * 256  # less embedding and norms
    assert costs.weights_read(config, 10_000) == pytest.approx(everything)
    assert costs.weights_read(config, 1) < costs.weights_read(config, 2) < everything
    assert costs.weights_read(TINY, 32) == costs.matrix_weights(TINY)


# Limits


def test_fastest_counts_no_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a limit that contains compiling or a first touch of memory, or the mean instead of the best."""
    clock, waits = [0.0], iter([5.0, 2.0, 0.5, 2.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(waits)

    assert limits.fastest(work, 4.5) == 0.5
    assert next(waits, None) is None, "it went on as long as it was told to"


def test_bandwidth_and_product_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a limit in the wrong unit: megabytes, or operations per call."""
    monkeypatch.setattr(limits, "fastest", lambda action, seconds: action() and 2.0)
    size = 1 << 20
    assert limits.read_bandwidth.__wrapped__(size, 2) == size * limits.passes(size) / 2.0
    read = []

    class Words(np.ndarray):
        def max(self):
            read.append(self.nbytes)

    monkeypatch.setattr(np, "ones", lambda count, dtype: np.zeros(count, dtype).view(Words))
    limits.reader(size, 2)()
    assert read == [size // 2] * limits.passes(size) * 2
    monkeypatch.setattr(limits, "SIDE", 32)
    monkeypatch.setattr(limits, "fastest", lambda action, seconds: action().shape == (32, 32) and 4.0)
    assert limits.product_rate("float32") == limits.product_rate("bfloat16")
    assert limits.product_rate("bfloat16") == limits.PRODUCT / 4.0


def test_the_closest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a share of the wrong limit, and steps of several tokens that pay for the weights once each."""
    monkeypatch.setattr(limits, "read_bandwidth", lambda size, threads: 1000.0)
    rates = {"float32": 100.0, "bfloat16": 400.0}
    assert speed.Speed("", "", 1.0, flops=2.0, products="float32").limit(rates) == (50.0, "float32")
    assert speed.Speed("", "", 1.0, flops=2.0, products="bfloat16").limit(rates)[0] == 200.0
    reading = speed.Speed("", "", 1.0, 2.0, "float32", step_bytes=100.0, step_tokens=4)
    assert reading.limit(rates) == (40.0, "memory")
    assert speed.Speed("", "", 1.0, 2.0, "float32", step_bytes=50.0, step_tokens=4).limit(rates)[0] == 50.0


# Speeds


def test_speaking_over_a_decoder() -> None:
    """Catches a measurement that runs over the end of the context, or counts one stream's tokens for all."""
    config = small("gqa", ctx_len=20)
    decoder = TorchDecoder(randomise(ThinkerLM(config)), slots=8)
    lines = list(speed.speaking(decoder, "torch", "float32", 0.0))
    assert [line.what for line in lines] == ["prefill, 20 tokens", "decode, 1 stream", "decode, 8 streams"]
    assert all(line.rate > 0 for line in lines)
    assert [line.step_tokens for line in lines] == [1, 1, 8]
    assert lines[2].step_bytes > lines[1].step_bytes > 4 * costs.matrix_weights(config)
    seconds = speed.decode(decoder, 8, prompt=10, new=4)
    assert seconds > 0
    assert [decoder.length(slot) for slot in range(8)] == [14] * 8


def test_a_context_of_one_token() -> None:
    """Bug: "tokens have shape (0,)" for a model whose ctx_len is 1, as its prompt was half of that."""
    decoder = TorchDecoder(randomise(ThinkerLM(small("gqa", ctx_len=1))), slots=8)
    lines = list(speed.speaking(decoder, "torch", "float32", 0.0))
    assert [line.what for line in lines] == ["prefill, 1 token", "decode, 1 stream", "decode, 8 streams"]


def test_random_weights_speak() -> None:
    """Catches logits that are all alike, of which no sampler's cost can be learned, and tensors that are missing."""
    config = small("moe", ctx_len=16)
    model = ThinkerLM(config).eval()
    weights = speed.random_weights(config)
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    with torch.inference_mode():
        logits = model(torch.arange(16)[None])
    assert 1 < float(logits.std()) < 4


def test_practice_is_training() -> None:
    """Catches a benchmark that leaves out the optimiser, or measures another batch than it says."""
    config = ThinkerConfig(vocab_size=300, n_layers=1, d_model=32, n_heads=2, d_ff=64, ctx_len=16, dropout=0.0)
    with repeatable(None):
        run = speed.practice(config, TrainConfig(steps=9, batch_size=3, precision="float32", compile="off"))
        assert not run.model.head.weight.any()  # zero at first, and all that moves in a first step
        seconds = speed.trainer(run)()
    assert seconds > 0
    assert run.step == 1
    assert run.batches.batch(0)[0].shape == (3, 16)
    assert run.model.head.weight.any()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> report.Report:
    """A report on a small model, on a machine without native kernels."""

    def refuse(*arguments: object) -> None:
        raise native.NativeUnavailable("no kernels here")

    monkeypatch.setattr(native, "open_native", refuse)
    monkeypatch.setattr(limits, "SIDE", 64)
    monkeypatch.setattr(limits, "PRODUCT", 2 * 64**3)
    monkeypatch.setattr(limits, "BEYOND", 1 << 20)
    monkeypatch.setattr(limits, "read_bandwidth", lambda size, threads: 1e9)
    files = speed.random_model(small("dense", ctx_len=24, vocab_size=300))
    return report.measure(files, report.QUICK, lambda line: None)


def test_report_and_table(measured: report.Report) -> None:
    """Catches a command that fails without native kernels, JSON that can't be written, and a line that is not shown."""
    assert [line.what for line in measured.speeds] == [
        "prefill, 24 tokens",
        "decode, 1 stream",
        "decode, 8 streams",
        "decode, 32 streams",
        "training, 8 x 24",
    ]
    values = json.loads(json.dumps(measured.to_json()))
    for line in values["speeds"]:
        assert line["share"] == line["rate"] / line["limit"]
    assert values["peak_memory"].keys() == {"in all"}, "nothing was decoded natively"
    assert values["peak_memory"]["in all"] > 10e6
    console = Console(file=io.StringIO(), width=80)  # what there is without a terminal
    command.show(measured, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Note: not measured natively: no kernels here" in shown
    assert all(line.what in shown for line in measured.speeds)
    assert "Peak memory" in shown
    assert "…" not in shown, "a cell is cut"


@pytest.mark.parametrize("width", [60, 80])
def test_no_digit_is_cut(measured: report.Report, width: int) -> None:
    """Bug: in 60 columns, or with a toy's nine digits, the table had "toke…" and "55,4…" for figures."""
    fast = [replace(line, how="bfloat16 compiled", rate=1_234_567.0, flops=0.001) for line in measured.speeds]
    console = Console(file=io.StringIO(), width=width)
    command.show(replace(measured, speeds=tuple(fast), product_rates={"float32": 87_654.0, "bfloat16": 9e9}), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert shown.count("1,234,567") == len(fast)
    assert all(f" {name} " in shown or f" {name}\n" in shown for name in ("tokens/s", "at best", "bound by", "share"))


def test_megabytes_are_millions_of_bytes(measured: report.Report) -> None:
    """Bug: memory was read "within 512 MB", which were 537, beside peaks counted in millions of bytes."""
    console = Console(file=io.StringIO(), width=80)
    command.show(replace(measured, bandwidths={512 << 20: 1e10}), console)
    assert "10 GB/s within 537 MB" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_measures_what_it_is_told_to(
    measured: report.Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --quick that is as slow as without, and something beside the JSON that a script reads."""
    asked = []
    monkeypatch.setattr(command, "measure", lambda *arguments: asked.append(arguments[:2]) or measured)
    assert command.run(command.Options(as_json=True)) == 0
    assert json.loads(capsys.readouterr().out)["speeds"] == measured.to_json()["speeds"]
    assert command.run(command.Options(quick=True)) == 0
    assert "decode, 8 streams" in capsys.readouterr().out
    assert [patience for _, patience in asked] == [report.Patience(), report.QUICK]
    assert all(files.config == TINY for files, _ in asked)


def test_sizes_that_int8_has_no_blocks_for() -> None:
    """Bug: a model 40 wide ended the command, float32's figures lost, with the advice to use a flag it hasn't."""
    config = small("dense", d_model=40, n_heads=2, head_dim=20, d_ff=72, ctx_len=16)
    notes: list[str] = []
    lines = list(report._native(speed.random_model(config), report.QUICK, lambda line: None, notes))
    assert {line.how for line in lines} == {"native float32"}
    assert [note for note in notes if "not measured natively in int8" in note and "blocks of 32" in note]


def test_threads_are_told_as_they_are_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: "runs with 1 thread" was said before the choice was made anew, and of prompts, which all threads compute."""

    class Fickle:
        threads, has_drafts = 1, False

    def spoken(decoder: Fickle, *arguments: object) -> list[speed.Speed]:
        decoder.threads = 2
        return []

    monkeypatch.setattr(native, "open_native", lambda *arguments: Fickle())
    monkeypatch.setattr(report, "speaking", spoken)
    notes: list[str] = []
    assert list(report._native(speed.random_model(TINY), report.QUICK, lambda line: None, notes)) == []
    told = [note for note in notes if "thread" in note]
    assert len(told) == 2
    assert all("writes 1 stream with 2 threads" in note for note in told)


def test_large_models_are_not_trained_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `thinker bench` on a large model that never ends."""
    notes: list[str] = []
    patience = report.QUICK
    assert list(report._training(TINY, 1e6, patience, lambda line: None, notes)) == []
    assert "would take minutes" in notes[0]


# Turns


class Fake:
    """A worker that keeps a diary; it dies when its name says so."""

    diary: list[str]

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        self.turns = 0

    def ready(self) -> dict[str, object]:
        self.diary.append(f"{self.name} ready")
        if self.name == "stillborn":
            raise Died("ended with status 1: no such module")
        return {"name": self.name}

    def turn(self) -> Turn:
        self.turns += 1
        self.diary.append(f"{self.name} {self.turns}")
        if self.name == "mortal" and self.turns == 3:
            raise Died("ended with status 9")
        return Turn(float(self.turns), 0.25)

    def end(self) -> int:
        if self.name == "restless":
            raise Died("said nothing for 900 s")
        return 1000

    def close(self) -> None:
        self.diary.append(f"{self.name} closed")


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    Fake.diary = []
    return Fake.diary


def meet(*names: str, rounds: int = 3, warm_ups: int = 1) -> tuple[Meeting, list[str]]:
    said: list[str] = []
    contestants = [Contestant(name, "fake:fake") for name in names]
    return turns.take_turns(contestants, rounds, warm_ups, said.append, Fake), said  # type: ignore[arg-type]


def test_order_alternates(diary: list[str]) -> None:
    """Catches one contestant that always comes after the same other, and warm-ups that count."""
    meeting, _ = meet("a", "b", "c")
    assert diary == [
        *("a ready", "a 1", "b ready", "b 1", "c ready", "c 1"),  # each prepares and warms up before the next begins
        *("a 2", "b 2", "c 2", "c 3", "b 3", "a 3", "a 4", "b 4", "c 4"),
        *("a closed", "b closed", "c closed"),
    ]
    assert meeting.results["b"] == Result((2.0, 3.0, 4.0), 1000, {"name": "b"})
    assert meeting.other_work == 0.25


def test_who_dies_is_left_out(diary: list[str]) -> None:
    """Catches a peer that is not installed, or that runs out of memory, and takes all others' results with it."""
    meeting, said = meet("stillborn", "steady", "mortal", "restless")
    assert meeting.results.keys() == {"steady"}
    assert meeting.left_out == {
        "stillborn": "ended with status 1: no such module",
        "mortal": "ended with status 9",
        "restless": "said nothing for 900 s",
    }
    assert [line for line in said if line.startswith("left out")] == [
        "left out: stillborn ended with status 1: no such module",
        "left out: mortal ended with status 9",
        "left out: restless said nothing for 900 s",
    ]
    assert sorted(line for line in diary if line.endswith("closed")) == [
        *("mortal closed", "restless closed", "steady closed", "stillborn closed"),
    ]
    assert "steady 4" in diary, "the others went on"


def test_nobody_is_left_running(diary: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that outlive Ctrl-C and disturb whatever is measured next."""

    def interrupted(worker: Fake) -> Turn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        meet("a", "b")
    assert diary == ["a ready", "a closed"]


FAKE_CONTESTANT = """
import sys, time
from benchmarks.contestants import Ready

def steady(seconds, units=6):
    print("a library's greeting")
    def turn():
        print("and chatter")
        return seconds
    return Ready(turn, units, {"answer": 42})

def missing():
    import nothing_of_that_name

def breaking():
    def turn():
        raise MemoryError("two lines\\nof trouble")
    return Ready(turn, 1)

def sleeping():
    time.sleep(60)
"""


@pytest.fixture
def contestant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "fake_contestant.py").write_text(FAKE_CONTESTANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda task, **options: Contestant(task, f"fake_contestant:{task}", options)


def test_a_real_worker(contestant) -> None:  # type: ignore[no-untyped-def]
    """Catches prints of a library taken for answers, and short turns that are not repeated until they count."""
    worker = turns.Worker(contestant("steady", seconds=0.1))
    try:
        assert worker.ready() == {"answer": 42}
        assert worker.turn(0.05).rate == pytest.approx(60)
        turn = worker.turn(0.25)
        assert turn.rate == pytest.approx(60)
        assert turn.others is None or turn.others >= 0
        assert worker.end() > 1e6
    finally:
        worker.close()


HERE = ("ours", "limit", "tutorial", "cold_start")  # contestants that need no peer installed


def test_whoever_needs_no_peer_can_be_prepared() -> None:
    """Bug: a name has changed in Thinker, and its own side is left out of every comparison, in a line among many."""
    matches = (*train_step.MATCHES, *decode.MATCHES, *growth.MATCHES)
    seen = set()
    for contestant in (contestant for match in matches for contestant in match.contestants):
        module, _, function = contestant.task.partition(":")
        if module.rpartition(".")[2] in HERE:
            inspect.signature(getattr(importlib.import_module(module), function)).bind(**contestant.options)
            seen.add(module.rpartition(".")[2])
    assert seen == set(HERE)
    assert limit.reading(1 << 16).turn() > 0


def test_an_interrupted_answer_leaves_no_watchdog(contestant) -> None:  # type: ignore[no-untyped-def]
    """Bug: after Ctrl-C the program hung for what was left of a quarter of an hour, until its watchdog had run out."""

    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    worker = turns.Worker(contestant("sleeping"))
    worker._answers.close()
    worker._answers = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        worker.ready()
    worker.close()
    watchdogs = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(watchdog.finished.is_set() for watchdog in watchdogs)


def test_last_words_are_one_line(contestant, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Catches a death without a reason, with a whole traceback, and one that is waited for forever."""
    said: list[str] = []
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    monkeypatch.setattr(turns, "PATIENCE", 20.0)
    nowhere = Contestant("nowhere", "x:y", python=Path("/nowhere/python"))
    meeting = turns.take_turns([contestant("missing"), contestant("breaking"), nowhere], 1, 0, said.append)
    assert not meeting.results
    assert meeting.left_out["missing"].endswith("ModuleNotFoundError: No module named 'nothing_of_that_name'")
    assert meeting.left_out["breaking"] == "ended with status 1: of trouble"
    assert "make -C benchmarks env" in meeting.left_out["nowhere"]
    assert all("\n" not in line for line in said)
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    worker = turns.Worker(contestant("sleeping"))
    with pytest.raises(Died, match="said nothing for 0 s"):
        worker.ready()
    worker.close()


# Results


def result(*rates: float) -> Result:
    return Result(rates, 1_000_000, {"threads": 2})


def test_ratio_of_medians_against_the_best() -> None:
    """Catches a comparison with the wrong peer, of means, or against one that isn't there."""
    there = {"ours": result(10, 20, 90), "slow": result(4, 5, 6), "good": result(10, 10, 12)}
    figure = results.ratio(there, "ours", ["slow", "good", "absent"])
    assert figure is not None
    assert (figure.value, figure.how) == (2.0, "ours / good")
    assert (figure.low, figure.high) == (1.5, 4.75)  # quartiles of 1, 2 and 7.5
    assert results.ratio(there, "ours", ["absent"]) is None
    assert results.ratio(there, "absent", ["good"]) is None
    assert results.quartiles([3.0]) == (3.0, 3.0)
    half = results.scaled(figure, 0.5, "halved")
    assert half == Figure(1.0, 0.75, 2.375, "halved")
    assert results.worst([None, figure, half]) == figure
    assert results.worst([None]) is None


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target("", 1.5, 2.5), 1.49, "no"),
        (Target("", 1.5, 2.5), 1.5, "yes"),
        (Target("", 1.5, 2.5), 2.5, "dream"),
        (Target("", 1.5, 0.7, "s", at_most=True), 1.6, "no"),
        (Target("", 1.5, 0.7, "s", at_most=True), 1.5, "yes"),
        (Target("", 1.5, 0.7, "s", at_most=True), 0.6, "dream"),
        (Target("", 0.5, None, at_most=True), 0.5, "yes"),
    ],
)
def test_targets(target: Target, value: float, met: str) -> None:
    """Catches a target taken the wrong way round."""
    assert target.met(value) == met


@pytest.mark.parametrize(
    ("target", "value", "said"),
    [
        (Target("", 1.5, 2.5), 1.49967, "1.4997 ×"),
        (Target("", 1.5, 2.5), 2.4996, "2.4996 ×"),
        (Target("", 1.5, 2.5), 1.5004, "1.5 ×"),
        (Target("", 1.15, 1.05, at_most=True), 1.0529, "1.053 ×"),
        (Target("", 1.15, 1.05, at_most=True), 1.0495, "1.05 ×"),
        (Target("", 57, 75, "%"), 36.0036, "36 %"),
    ],
)
def test_what_falls_short_is_not_rounded_to_the_goal(target: Target, value: float, said: str) -> None:
    """Bug: the table had "at least 1.5 ×" and "1.5 × (short)", and 1.05 × both with and without the dream reached."""
    assert target.said(value) == said


MACHINE = {"processor": "Some CPU", "instructions": "AVX2", "cores": 2, "system": "Linux", "python": "3.11"}


def match(name: str, figure: Figure | None) -> Match:
    lines = [Line(Target(f"speed of {name}", 2.0, 3.0), figure)]
    return Match(name, f"About {name}", "tokens/s", (), lambda results: lines)


def test_results_are_written_and_merged(tmp_path: Path) -> None:
    """Catches a second run of one line that loses the others, or a missing peer that passes for a result."""
    met = Meeting({"ours": result(1000, 2000, 3000)}, {}, 0.02)
    alone = Meeting({"ours": result(5)}, {"peer": "ended with status 1"}, None)
    first, second = match("one", Figure(3.5, 3.0, 4.0, "ours / peer")), match("two", None)
    results.save(
        tmp_path, {"one": results.as_json(first, met, MACHINE), "two": results.as_json(second, alone, MACHINE)}
    )
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Some CPU (AVX2), 2 cores, Linux, Python 3.11" in text
    assert "| speed of one | 3.5 × (3 to 4) | 2 × | 3 × | dream | ours / peer | `one` |" in text
    assert "| speed of two | – | 2 × | 3 × | not measured |  | `two` |" in text
    assert "| ours | 2,000 | 1,500 to 2,500 | 1 MB | threads 2 |" in text
    assert "Left out: peer, ended with status 1." in text
    assert "other work had 2% of the machine" in text

    again = match("one", Figure(1.0, 1.0, 1.0, "ours / peer"))
    results.save(tmp_path, {"one": results.as_json(again, met, MACHINE)})
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| speed of one | 1 × (1 to 1) | 2 × | 3 × | no |" in text
    assert "About two" in text
    assert json.loads((tmp_path / "results.json").read_text())["one"]["contestants"]["ours"]["rates"] == [
        *(1000, 2000, 3000),
    ]


def test_all_machines_stand_side_by_side(tmp_path: Path) -> None:
    """Catches a machine whose line lands in another's column, and one that falls short in silence."""
    met = Meeting({"ours": result(1000, 2000, 3000)}, {}, 0.02)
    for machine, values in (("a", {"one": 3.5, "two": 2.5}), ("b", {"two": 1.5})):
        (tmp_path / "machines" / machine).mkdir(parents=True)
        done = {name: match(name, Figure(value, value, value, "ours / peer")) for name, value in values.items()}
        results.save(
            tmp_path / "machines" / machine, {name: results.as_json(one, met, MACHINE) for name, one in done.items()}
        )
    (tmp_path / "machines" / "nothing yet").mkdir()
    results.save_overview(tmp_path / "machines")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "|  | at least | dream | [a](machines/a/RESULTS.md) | [b](machines/b/RESULTS.md) |" in text
    assert "| speed of one | 2 × | 3 × | **3.5 ×** | – |" in text
    assert "| speed of two | 2 × | 3 × | 2.5 × | 1.5 × (short) |" in text
    assert "- b: Some CPU (AVX2), 2 cores" in text


def test_growth_is_drawn(tmp_path: Path) -> None:
    """Catches a picture that fails when some points are missing, as after a run of a few matches."""
    growth_of_batch = {name: result(100 * (i + 1)) for i, name in enumerate(("1", "2", growth.PRODUCTS))}
    context = {"float32 at 16": result(1.0, 2.0), "int8 at 32": result(3.0), growth.READING: result(1e9)}
    for name, there in (("growth-batch", growth_of_batch), ("growth-context", context)):
        chosen = next(match for match in growth.MATCHES if match.name == name)
        results.save(tmp_path, {name: results.as_json(chosen, Meeting(there, {}, None), MACHINE)})
    growth.draw(tmp_path)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "growth.png" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_growth_is_drawn_on_another_machine(dtype: str) -> None:
    """Bug: a machine slow in bfloat16 drew the results of one with it without the line of what products alone take."""
    axes = MatplotlibFigure().subplots()
    growth.draw_training(axes, "growth-batch", {"1": [100.0], f"{dtype} products, operations/s": [1e12]})
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["products alone"]


# Matches


def test_every_line_of_the_table_is_measured_somewhere() -> None:
    """Catches a line that was forgotten, two matches of one name, and a judge that fails when peers are missing."""
    assert len({match.name for match in MATCHES}) == len(MATCHES)
    lines = [line for match in MATCHES for line in match.judge({})]
    assert all(line.figure is None for line in lines)
    assert len(lines) == 15 + 1  # the table's lines about speed and memory; the cold start has two numbers
    assert len({line.target.line for line in lines}) == len(lines)
    for match in MATCHES:
        names = [contestant.name for contestant in match.contestants]
        assert len(set(names)) == len(names)


def test_every_judge_finds_its_contestants() -> None:
    """Catches a line that stays "not measured" because a contestant has another name by now."""
    for match in MATCHES:
        about = {"threads": 1, "bytes of keys and values": 4}
        there = {one.name: Result((1.0, 1.0), 1, about) for one in match.contestants}
        assert all(line.figure is not None for line in match.judge(there)), match.name


def test_tasks_exist() -> None:
    """Catches a contestant whose function was renamed; peers need not be installed for that."""
    for contestant in (contestant for match in MATCHES for contestant in match.contestants):
        module, function = contestant.task.split(":")
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        signature = found[function].args
        accepted = {argument.arg for argument in signature.args + signature.kwonlyargs}
        assert set(contestant.options) <= accepted or signature.kwarg is not None, contestant


def test_the_package_knows_nothing_of_benchmarks() -> None:
    """Catches a product that needs its own comparisons to run."""
    package = Path(thinker.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "benchmarks"], path


@pytest.mark.parametrize("fused", [False, True])
def test_tutorial_code_is_the_same_network(fused: bool) -> None:
    """Catches a strawman: a baseline that computes something else, or more."""
    sizes = {"vocab_size": 61, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
    ours = randomise(ThinkerLM(ThinkerConfig(**sizes, ctx_len=12, dropout=0.0)))
    theirs = tutorial.LanguageModel(TrainingShape(**sizes, batch=1, length=12), fused)
    renamed = {name.replace(".mlp.", "."): value for name, value in ours.named_parameters()}
    theirs.load_state_dict(renamed, strict=False)
    assert dict(theirs.named_parameters()).keys() == renamed.keys()
    tokens = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = ours(tokens), theirs(tokens)
    assert float((expected - found).abs().max()) < 1e-5 * float(expected.abs().max())
