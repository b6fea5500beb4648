"""litgpt: the same network as a Llama of its own, trained with a plain loop and its chunked cross-entropy."""

from __future__ import annotations

from importlib.metadata import version

import litgpt
import torch
from litgpt.utils import chunked_cross_entropy

from . import Ready, timed
from .plain_loop import TrainingShape, random_batch, training_step


def train(shape: dict[str, int], precision: str, compiled: bool) -> Ready:
    """Whole training steps: forward, loss, backward, clipping, fused AdamW."""
    size = TrainingShape(**shape)
    config = litgpt.Config(
        name="tiny",
        block_size=size.length,
        vocab_size=size.vocab_size,
        padded_vocab_size=size.vocab_size,
        n_layer=size.n_layers,
        n_head=size.n_heads,
        n_embd=size.d_model,
        intermediate_size=size.d_ff,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )
    model = litgpt.GPT(config).train()
    model.apply(model._init_weights)
    tokens = random_batch(size)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = torch.compile(model) if compiled else model
    step = training_step(model, lambda: chunked_cross_entropy(forward(inputs), targets), precision)
    about = {
        "litgpt": version("litgpt"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Ready(lambda: timed(step), size.batch * size.length, about)
