"""transformers: its Llama, trained with a plain loop, and its `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from . import Ready, timed
from .plain_loop import TrainingShape, random_batch, training_step


def train(shape: dict[str, int], precision: str, compiled: bool) -> Ready:
    """Whole training steps: forward with its own loss, backward, clipping, fused AdamW."""
    size = TrainingShape(**shape)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        max_position_embeddings=size.length,
        rms_norm_eps=1e-6,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    tokens = random_batch(size)[:, :-1]  # its loss shifts the labels itself
    forward = torch.compile(model) if compiled else model
    step = training_step(model, lambda: forward(input_ids=tokens, labels=tokens).loss, precision)
    return Ready(lambda: timed(step), size.batch * size.length, _about(model, config._attn_implementation))


def decode(model: str, streams: int = 1, prompt: int = 16, new: int = 256, cache: str = "dynamic") -> Ready:
    """`generate`, greedy, float32: prompts of `prompt` tokens and `new` tokens after each; everything counts."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None  # so that every text has its full length
    torch.manual_seed(0)
    tokens = torch.randint(network.config.vocab_size, (streams, prompt))
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "cache_implementation": cache}

    @torch.inference_mode()
    def turn() -> float:
        start = time.perf_counter()
        made = network.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        seconds = time.perf_counter() - start
        assert made.shape == (streams, prompt + new), made.shape
        return seconds

    return Ready(turn, streams * new, _about(network, network.config._attn_implementation) | {"cache": cache})


def _about(model: torch.nn.Module, attention: str) -> dict[str, Any]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "attention": attention,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
