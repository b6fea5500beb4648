"""What a person sees of a run: the progress bar, metrics, and looks at held-out text with a sample.

Nothing here steers the run. Metrics go to `metrics.jsonl`, one JSON object a line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..checkpoint.files import write_text
from ..data.chat_shards import ChatCorpus
from ..data.shards import Corpus
from ..decode.torch_decoder import TorchDecoder
from ..generate import Engine, Request
from ..sampling import Sampling
from .held_out import held_out_loss
from .loop import StepReport
from .replies import Exchange, exchanges, question, replies
from .run import Run

SAMPLE_TOKENS = 48


class Reporter:
    """Follows a run on a console and in its metrics file. A context manager: the bar ends with it."""

    def __init__(self, run: Run, console: Console) -> None:
        self.console = console
        self.path = run.folder / "metrics.jsonl"
        run.folder.mkdir(parents=True, exist_ok=True)
        self.rows = kept_metrics(self.path, run.step)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = self.path.open("a", buffering=1, encoding="utf-8")  # by lines: never behind a saved state
        self.board = open_tensorboard(run.folder) if run.settings.tensorboard else None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("training", total=1.0)
        self.bar.update(self.task, completed=run.progress())
        self.loss: float | None = None
        self.speed: float | None = None

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def compiling(self, run: Run) -> None:
        """Say what the bar is waiting for."""
        self.bar.update(self.task, description="compiling the training step")

    def out_of_memory(self, run: Run) -> None:
        """Say that the batch was halved, and what stays."""
        rows = run.settings.batch_size * run.settings.accumulate
        self.console.print(
            f"out of memory at step {run.step + 1:,}: going on with {run.rows_at_once} rows at once, "
            f"{run.micro_batches} times a step; its {rows} rows and {run.batches.tokens_per_batch:,} tokens stay",
            soft_wrap=True,
        )

    def after_step(self, run: Run, report: StepReport) -> None:
        """Record a step and move the bar."""
        speed = report.tokens / report.seconds
        self.loss = report.loss if self.loss is None else 0.9 * self.loss + 0.1 * report.loss
        self.speed = speed if self.speed is None else 0.9 * self.speed + 0.1 * speed
        row = {
            "step": report.step,
            "tokens": run.tokens,
            "seconds": round(run.seconds, 3),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens_per_second": round(speed, 1),
        }
        self._record(row | ({"balance": report.balance} if run.config.use_moe else {}))
        text = f"step {report.step:,}  loss {self.loss:.3f}  {self.speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=report.progress, description=text)

    def validate(self, run: Run) -> None:
        """Measure the loss on some of the held-out text, and show a short sample."""
        loss = held_out_loss(run)
        bits = loss / math.log(2) * run.corpus.tokens_per_byte
        self._record({"step": run.step, "held_out_loss": loss, "held_out_bits_per_byte": bits})
        line = Text(f"step {run.step:,}: held-out loss {loss:.3f}, {bits:.3f} bits per byte   ")
        line.append(one_line(look(run)), style="dim")
        self.console.print(line, no_wrap=True, overflow="ellipsis")

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])


def kept_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of an earlier process up to the step that the run goes on from; a line that is none is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            rows.append(row)
    return rows


def open_tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files. Raises `ValueError` when it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install 'thinker[tensorboard]', or drop the flag") from None
    return SummaryWriter(folder / "tensorboard")


def sample(run: Run, prompt: str, seed: int, tokens: int = SAMPLE_TOKENS, temperature: float = 0.8) -> str:
    """What the model writes after a prompt, as it is now."""
    run.module.eval()
    engine = Engine(TorchDecoder(run.model), run.tokenizer)
    bos = [] if run.tokenizer.bos_id is None else [run.tokenizer.bos_id]
    request = Request(
        tokens=tuple(bos + run.tokenizer.encode(prompt)),
        sampling=Sampling(temperature=temperature, top_p=0.95, seed=seed),
        max_new_tokens=tokens,
        eos_ids=frozenset(run.publication.eos_ids),
        echo=prompt,
    )
    text = "".join(piece.text for piece in engine.run([request]))
    run.module.train()
    return text


def look(run: Run) -> str:
    """What the model makes of held-out text, or the reply to a held-out question, as it is now."""
    if isinstance(run.corpus, ChatCorpus):
        exchange = exchanges(run.corpus.valid, run.config.ctx_len, 1)[0]
        if run.settings.prompt is not None:
            asked = run.corpus.chat_format.encode([{"role": "user", "content": run.settings.prompt}])
            exchange = Exchange(tuple(asked), reply=())
        return f"{question(run, exchange)} {replies(run, [exchange])[0]}"
    return sample(run, opening(run, run.corpus), seed=run.step)


def opening(run: Run, corpus: Corpus) -> str:
    """What the samples along the way go on from: what was asked for, or the beginning of the held-out text."""
    if run.settings.prompt is not None:
        return run.settings.prompt
    text = next(corpus.valid_text())[:160].decode("utf-8", errors="ignore").split("\n")[0][:40].rstrip(" ")
    return fitting(run, text)


def fitting(run: Run, text: str) -> str:
    """As much of the beginning of a text as leaves half of the context to go on in."""
    ids, room = run.tokenizer.encode(text), run.config.ctx_len // 2
    return text if len(ids) <= room else run.tokenizer.decode(ids[:room]).rstrip("\N{REPLACEMENT CHARACTER}")


def one_line(text: str) -> str:
    """Text as a person can read it within a line."""
    return " ".join(text.replace("\n", " ⏎ ").split())
