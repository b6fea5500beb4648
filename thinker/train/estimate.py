"""How much memory a run would take at its peak, worked out without running it, and the nearest setting that fits.

Tensors and the allocator's holes come from a rehearsal (`rehearsal.py`). What a process has besides is measured in this
very one: what it holds before there is a model, once the libraries have shown what they keep for themselves. What a
person reads of it is in `dry_run.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..checkpoint.publish import Publication
from ..config import ThinkerConfig
from ..data.chat_shards import ChatCorpus
from ..data.shards import Corpus
from ..model import ThinkerLM
from ..moe import SPACING
from .allocator import resident, trim
from .config import TrainConfig
from .decide import DTYPES, Decisions, Precision
from .ingredients import batches_of
from .loop import take_step
from .rehearsal import Rehearsal, rehearse
from .run import Run
from .start import assemble

PROGRAMS = 1024  # products that oneDNN keeps programs for, unless its environment says otherwise
TRIED = 32  # products from whose programs the size of one is measured
SHORTEST = 32  # tokens: less context is no remedy

# A compiled run: what importing the compiler and tracing a block leave behind (torch 2.13, four and eight blocks).
COMPILER = 120 << 20
COMPILED_BLOCK = 1 << 20

# The report at the end brings matplotlib and the sampler, in which the heap has no part, and xz -9, for which the heap
# has room after the steps: liblzma's table, and what it keeps of each byte of held-out text in a window of 64 MiB.
REPORT_LIBRARIES = 90 << 20
XZ_TABLE, XZ_PER_BYTE, XZ_WINDOW = 64 << 20, 9, 64 << 20

ACCELERATOR = 500 << 20  # what an accelerator's driver and libraries take of its memory: an assumption


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a run with these settings. `base` is all that is neither a tensor nor a hole between two."""

    config: ThinkerConfig
    settings: TrainConfig
    base: int
    rehearsal: Rehearsal
    report: int  # what the report at the end takes of the heap, besides what a run holds between two steps

    @property
    def peak(self) -> int:
        """At the peak of a step, or in the report at the end."""
        return self.base + max(self.rehearsal.peak, self.rehearsal.rest + self.report)

    @property
    def holes(self) -> int:
        """What the allocator holds at the peak that no tensor uses, and what the report takes on top."""
        return self.peak - self.base - sum(self.rehearsal.at_peak.values())


@dataclass(frozen=True)
class Plan:
    """A run that is thought about: what it is made of, and what it would decide."""

    corpus: Corpus | ChatCorpus
    publication: Publication
    decisions: Decisions
    own: int = 0  # bytes that the process holds without a model
    program: int = 0  # bytes of a program of oneDNN's

    @property
    def accelerated(self) -> bool:
        """Whether the run is an accelerator's."""
        return torch.device(self.decisions.device).type != "cpu"

    def run(self, config: ThinkerConfig, settings: TrainConfig, decisions: Decisions | None = None) -> Run:
        """The run at step 0, with random parameters: true ones, or without values where tensors have none."""
        model = ThinkerLM(config)
        # A ramp's smaller steps take less than the others.
        batches = batches_of(self.corpus, settings.changed(ramp=0), config, lambda line: None)
        decided = self.decisions if decisions is None else decisions
        return assemble(settings.folder, config, settings, decided, self.corpus, model, batches, self.publication)

    def estimate(self, config: ThinkerConfig, settings: TrainConfig) -> Estimate:
        """What a run of this architecture with these settings would take. Raises `ValueError` for too little text."""
        # The second batch of a step is as the third, unless texts have a share of the step's rows; nothing that is
        # rehearsed looks at values.
        few = settings if settings.text else settings.changed(accumulate=min(settings.accumulate, 2))
        # Without values everything is the processor's, and float16, which would want a scaler, like bfloat16.
        narrow: Precision = "float32" if self.decisions.precision == "float32" else "bfloat16"
        decisions = replace(self.decisions, device="cpu", precision=narrow)
        rehearsal = rehearse(lambda: self.run(config, few, decisions), accelerator=self.accelerated)
        if self.accelerated:
            return Estimate(config, settings, ACCELERATOR, rehearsal, 0)
        base = self.own + REPORT_LIBRARIES + self.program * programs(rehearsal, config, settings)
        if self.decisions.compile:
            base += COMPILER + config.n_layers * COMPILED_BLOCK
        report = 0
        if isinstance(self.corpus, Corpus):
            held_out = self.corpus.valid_bytes
            report = held_out + XZ_TABLE + XZ_PER_BYTE * min(held_out, XZ_WINDOW)
        return Estimate(config, settings, base, rehearsal, report)

    def nearest(self, first: Estimate, limit: int, say: Callable[[str], None]) -> Estimate | None:
        """The first of `remedies` whose estimate is within `limit` bytes, None when none is."""
        for config, settings in remedies(first.config, first.settings):
            say(f"trying {changes(first.config, first.settings, config, settings)}")
            tried = self.estimate(config, settings)
            if tried.peak <= limit:
                return tried
        return None


def remedies(config: ThinkerConfig, settings: TrainConfig) -> Iterator[tuple[ThinkerConfig, TrainConfig]]:
    """Ever smaller settings: fewer rows at once of as many in a step, then recomputed activations, then less context.

    Rows that can't be halved are divided by the next number that divides them: 9 rows become 3 times 3.
    """
    rows = settings.batch_size * settings.accumulate
    while settings.batch_size > 1:
        at_once = next(n for n in range(settings.batch_size // 2, 0, -1) if rows % n == 0)
        settings = settings.changed(batch_size=at_once, accumulate=rows // at_once)
        yield config, settings
    if not settings.checkpoint_activations:
        settings = settings.changed(checkpoint_activations=True)
        yield config, settings
    while config.ctx_len >= 2 * SHORTEST:
        config = config.changed(ctx_len=config.ctx_len // 2)
        yield config, settings


def changes(config: ThinkerConfig, settings: TrainConfig, to: ThinkerConfig, other: TrainConfig) -> str:
    """What differs, as flags."""
    flags = []
    for name in ("batch_size", "accumulate"):
        if getattr(other, name) != getattr(settings, name):
            flags.append(f"--{name.replace('_', '-')} {getattr(other, name)}")
    if other.checkpoint_activations != settings.checkpoint_activations:
        flags.append("--checkpoint-activations")
    if to.ctx_len != config.ctx_len:
        flags.append(f"--ctx-len {to.ctx_len}")
    return " ".join(flags)


def programs(rehearsal: Rehearsal, config: ThinkerConfig, settings: TrainConfig) -> int:
    """How many programs for products oneDNN comes to keep: one for each size that a group of rows comes to have."""
    steps = PROGRAMS if settings.steps is None else settings.steps * settings.accumulate + 1  # with the probe
    sizes = -(-settings.batch_size * config.ctx_len * config.num_experts_per_tok // SPACING)
    groups = min(config.num_experts * config.n_layers * steps, sizes)
    return min(PROGRAMS, rehearsal.products + rehearsal.grouped * groups)


def measured(plan: Plan, config: ThinkerConfig, settings: TrainConfig) -> Plan:
    """The same plan, with what this process holds when its libraries have worked once and no model is left."""
    small = ThinkerConfig(
        vocab_size=config.vocab_size,
        n_layers=1,
        d_model=128,
        n_heads=2,
        d_ff=256,
        ctx_len=config.ctx_len,
        use_moe=config.use_moe,
    )
    one_row = settings.changed(batch_size=1, accumulate=1, text=())
    run = plan.run(small, one_row)
    for _ in range(2):
        take_step(run, run.module, 1.0)
        run.step += 1
    rehearse(lambda: plan.run(small, one_row), steps=1)
    del run
    gc.collect()
    trim()
    own = resident()  # before programs are tried, which this process then keeps
    return replace(plan, own=own, program=program_size(plan.decisions.precision))


def program_size(precision: Precision) -> int:
    """Bytes of a program that oneDNN keeps for a product's shape; products in float32 are another library's."""
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return 0
    gc.collect()
    trim()
    before = resident()
    weight = torch.ones(384, 256, dtype=dtype)
    for rows in range(200, 200 + TRIED):
        torch.ones(rows, 256, dtype=dtype) @ weight.T
    trim()
    return max(resident() - before, 0) // TRIED
