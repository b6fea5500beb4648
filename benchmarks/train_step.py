"""Training steps of the tiny configuration, 8 x 512 tokens: Thinker, transformers, litgpt, tutorial code, the machine.

    python -m benchmarks.train_step [train] [moe]

AdamW on both sides; Thinker's default, Muon, is one more contestant. Everyone clips the gradient and pays for it. On a
processor that is slow in bfloat16 everything is float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinker.bench import costs
from thinker.config import ThinkerConfig

from .precision import fast
from .results import Figure, Line, Match, Results, Target, ratio, scaled
from .run import main
from .turns import ROOT, Contestant

ROWS = 8
TINY = ThinkerConfig.model_validate({"dropout": 0.0})
SHAPE = {name: getattr(TINY, name) for name in ("vocab_size", "n_layers", "d_model", "n_heads", "d_ff")}
SHAPE |= {"batch": ROWS, "length": TINY.ctx_len}
FAST = fast()
PRECISIONS = dict.fromkeys(("float32", FAST))  # one, or two
OURS, PRODUCTS = f"Thinker, compiled {FAST}", f"{FAST} products, operations/s"

PEERS = [
    Contestant(
        f"{peer}, {'compiled' if compiled else 'eager'} {precision}",
        f"benchmarks.contestants.{module}:train",
        {"shape": SHAPE, "precision": precision, "compiled": compiled},
        python,
    )
    for peer, module, python in (
        ("transformers", "huggingface", Path(sys.executable)),
        ("litgpt", "lightning", ROOT / ".bench-venv" / "litgpt" / "bin" / "python"),
    )
    for precision, compiled in (*((precision, False) for precision in PRECISIONS), (FAST, True))
]
TUTORIALS = [
    Contestant(
        f"tutorial code, {attention} attention, eager float32",
        "benchmarks.contestants.tutorial:train",
        {"shape": SHAPE, "fused": attention == "fused"},
    )
    for attention in ("explicit", "fused")
]
COMPILED_PEERS = [peer.name for peer in PEERS if peer.options["compiled"]]


def ours(name: str, architecture: dict[str, Any] | None = None, **settings: Any) -> Contestant:
    """Thinker's step; compiled, in the processor's fast precision and with AdamW unless said."""
    chosen = {"optimizer": "adamw", "precision": FAST, "compile": "on", "batch_size": ROWS} | settings
    options = {"architecture": architecture or {}, "settings": chosen}
    return Contestant(name, "benchmarks.contestants.ours:train", options)


def judge(results: Results) -> Sequence[Line]:
    """Against the best compiled peer, against tutorial code, and the share of the machine's products."""
    work = costs.training_flops(TINY, TINY.ctx_len)
    peer, tutorial = ratio(results, OURS, COMPILED_PEERS), ratio(results, OURS, [one.name for one in TUTORIALS])
    share = scaled(ratio(results, OURS, [PRODUCTS]), 100 * work, f"{work / 1e6:.1f} MFLOP a token, {OURS}")
    return [
        Line(Target("training tokens/s against the best compiled peer", 1.25, 1.8), peer),
        Line(Target("… against plain eager float32 code", 3, 5), tutorial),
        Line(Target("… share of the machine's measured rate of such products", 57, 75, "%"), share),
    ]


COMPILE = "on" if FAST == "bfloat16" else "off"  # torch compiles a mixture's products in bfloat16 only
DENSE, MIXTURE = "dense, d_ff 1024", "8 experts of d_ff 512, top 2"


def judge_mixture(results: Results) -> Sequence[Line]:
    """How many times as long the mixture takes."""
    longer: Figure | None = ratio(results, DENSE, [MIXTURE])
    target = Target("MoE training step against a dense model of the same active size", 1.6, 1.25, "× the time", True)
    return [Line(target, longer)]


MATCHES: tuple[Match, ...] = (
    Match(
        "train",
        "Training step, tiny configuration, 8 × 512",
        "tokens/s",
        (
            ours(OURS),
            ours(f"{OURS}, Muon", optimizer="muon"),
            *(ours(f"Thinker, eager {one}", compile="off", precision=one) for one in reversed(PRECISIONS)),
            *PEERS,
            *TUTORIALS,
            Contestant(PRODUCTS, "benchmarks.contestants.limit:products", {"dtype": FAST}),
        ),
        judge,
    ),
    Match(
        "moe",
        "Training step, a mixture against a dense model of the same active size, 8 × 512",
        "tokens/s",
        (ours(DENSE, compile=COMPILE), ours(MIXTURE, {"use_moe": True, "d_ff": TINY.d_ff // 2}, compile=COMPILE)),
        judge_mixture,
        warm_ups=12,  # the first ten steps meet sizes of groups that oneDNN has no programs for yet
    ),
)

if __name__ == "__main__":
    main(MATCHES)
