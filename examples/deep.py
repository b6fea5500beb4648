"""128 layers that learn from the first step: what pre-norm and zero-initialised branches do, seen layer by layer.

    python examples/deep.py [--layers 128] [--steps 150] [--out deep]

Trains a narrow, very deep model on Python's own source, by characters, draws its loss and the norms of each layer's
gradients (deep/loss.png, deep/gradients.png), and shows beside them what post-norm, x = norm(x + f(x)), makes of the
gradients at the same depth. The steps are the training loop's own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thinker import ThinkerConfig
from thinker.loss import NextTokenLoss
from thinker.model import Block, ThinkerLM
from thinker.plots import smoothed
from thinker.train.config import TrainConfig
from thinker.train.decide import repeatable
from thinker.train.loop import take_step
from thinker.train.optim import rate
from thinker.train.run import Run
from thinker.train.start import begin

SIZES = {"d_model": 32, "n_heads": 2, "d_ff": 88, "ctx_len": 64, "dropout": 0.0, "use_qk_norm": True}


@dataclass(frozen=True)
class Curves:
    """The loss of every step, and by step the norm of the gradient of every layer."""

    losses: list[float]
    gradients: dict[int, list[float]]


class Recorder:
    """Norms of the layers' gradients, taken in the step, before clipping."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.squares = [torch.zeros(()) for _ in blocks]
        for layer, block in enumerate(blocks):
            for parameter in block.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p, layer=layer: self._add(layer, p))

    def _add(self, layer: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.squares[layer] = self.squares[layer] + parameter.grad.square().sum()

    def take(self) -> list[float]:
        """The norms since they were last taken."""
        norms = [float(square.sqrt()) for square in self.squares]
        self.squares = [torch.zeros(()) for _ in norms]
        return norms


def train(run: Run, steps: int) -> Curves:
    """Take the steps, and keep the gradients of a few of them."""
    recorder = Recorder(run.model.blocks)
    kept = {1, 5, 10, steps // 2, steps}
    losses, gradients = [], {}
    for step in range(1, steps + 1):
        schedule, warmup, cooldown = run.settings.schedule, run.settings.warmup, run.settings.cooldown
        share = rate(run.progress(), schedule=schedule, warmup=warmup, cooldown=cooldown)
        losses.append(take_step(run, run.module, share)[0])
        run.step += 1
        norms = recorder.take()
        if step in kept:
            gradients[step] = norms
    return Curves(losses, gradients)


def gradients_of(config: ThinkerConfig, batch: tuple[Tensor, Tensor], post_norm: bool) -> list[float]:
    """Norms of the layers' gradients of a model whose matrices are all random, as textbooks have it: no zero branch."""
    torch.manual_seed(0)
    model = ThinkerLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if post_norm:
        for block in model.blocks:
            assert isinstance(block, Block)
            block.forward = lambda x, rotation, *_, block=block: (post_norm_block(block, x, rotation), None)
    recorder = Recorder(model.blocks)
    parts = NextTokenLoss(model)(*batch)
    (parts.total / parts.tokens).backward()
    return recorder.take()


def post_norm_block(block: Block, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The norm after the sum, on the stream itself: what the first transformer had (arXiv 1706.03762)."""
    x = block.norm1(x + block.attn(x, rotation))
    return block.norm2(x + block.feed_forward(x)[0])


def draw(out: Path, curves: Curves, comparison: dict[str, list[float]]) -> None:
    """loss.png and gradients.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(curves.losses) + 1)
    axes.plot(steps, curves.losses, color="#9ab8d9", linewidth=0.8, label="each step's batch")
    axes.plot(steps, smoothed(curves.losses, 0.9), color="#2b5c8f", label="smoothed")
    axes.set(xlabel="step", ylabel="nats per character", title=f"{len(next(iter(comparison.values())))} layers")
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png")

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    # In the first step there are none: a head of zeros passes nothing back.
    for step, norms in list(curves.gradients.items())[1:]:
        left.plot(range(1, len(norms) + 1), norms, label=f"step {step}")
    left.set(title="in training: pre-norm, zero branches at first", xlabel="layer", ylabel="norm of the gradient")
    for name, norms in comparison.items():
        right.plot(range(1, len(norms) + 1), norms, label=name)
    right.set(title="before training, all matrices random", xlabel="layer")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.legend(frameon=False)
    figure.savefig(out / "gradients.png")


def main(layers: int = 128, steps: int = 150, out: Path = Path("deep"), data: str = "stdlib") -> Curves:
    """Train, draw, and say how it went."""
    out.mkdir(parents=True, exist_ok=True)
    config = ThinkerConfig.model_validate(SIZES | {"n_layers": layers, "vocab_size": 400})
    settings = TrainConfig(
        data=(data,), out=out / "run", steps=steps, tokenizer="char", batch_size=16, compile="off", precision="float32"
    )
    with repeatable(None):
        run = begin(config, settings, set(), print)
        inputs, targets = (torch.from_numpy(part) for part in run.batches.batch(0))
        curves = train(run, steps)
    comparison = {
        name: gradients_of(run.config, (inputs, targets), post_norm)
        for name, post_norm in (("pre-norm: x + f(norm(x))", False), ("post-norm: norm(x + f(x))", True))
    }
    draw(out, curves, comparison)
    tenths = np.array_split(curves.losses, min(10, steps))
    means = [float(tenth.mean()) for tenth in tenths]
    print(f"{layers} layers, {run.config.parameter_count():,} parameters; the loss by tenths of the run:")
    print("  " + "  ".join(f"{mean:.3f}" for mean in means))
    for name, norms in comparison.items():
        print(f"{name}: the first layer's gradient is {norms[0] / norms[-1]:.3g} times the last one's")
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="128 layers that learn from the first step.")
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("deep"))
    parser.add_argument("--data", default="stdlib")
    try:
        main(**vars(parser.parse_args()))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
