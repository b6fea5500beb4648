"""What a model's work costs by arithmetic: operations and bytes, computed from its configuration alone.

A multiplication and its addition count as two operations. Norms, activations, softmax and the optimiser are left out,
as everywhere where shares of a machine's product rate are given. Nothing is measured in here.
"""

# D d_model, H query heads, G key/value heads, F d_ff, E experts, K experts per token, V vocab_size

from __future__ import annotations

from ..config import ThinkerConfig

# Of one weight as decoding reads it. INT8 has Q8_0's numbers: a float16 scale for each block of 32.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 / 32}
CACHED = {"float32": 4, "bfloat16": 2, "int8": 2}  # bytes of a key's or a value's element, beside weights of this type


def matrix_weights(config: ThinkerConfig) -> int:
    """Weights that one token is multiplied by: those of every matrix but the embedding, and of K experts of E."""
    blocks = config.n_layers * (_attention_weights(config) + _router_weights(config))
    return blocks + config.n_layers * _used(config) * _mlp_weights(config) + _head_weights(config)


def weights_read(config: ThinkerConfig, rows: int) -> float:
    """Weights that a step of `rows` tokens must read at least once; of a mixture, with evenly chosen experts."""
    missed = (1 - _used(config) / config.num_experts) ** rows  # the share of experts that no row has chosen
    experts = config.num_experts * (1 - missed) if config.use_moe else 1
    blocks = config.n_layers * (_attention_weights(config) + _router_weights(config))
    return blocks + config.n_layers * experts * _mlp_weights(config) + _head_weights(config)


def attention_flops(config: ThinkerConfig, seen: float) -> float:
    """Of one query that sees `seen` keys, in all layers: its scores, and the sum of the values."""
    return config.n_layers * 2 * 2 * seen * config.n_heads * config.head_width


def training_flops(config: ThinkerConfig, length: int) -> float:
    """Of one token in a row of `length`, forward and backward, which costs twice the forward.

    Causal attention counts half: a token sees (length + 1) / 2 keys on average.
    """
    return 3 * (2 * matrix_weights(config) + attention_flops(config, (length + 1) / 2))


def prefill_flops(config: ThinkerConfig, length: int) -> float:
    """Of a whole prompt of `length` tokens, with logits for the last one only."""
    head = _head_weights(config)
    body = 2 * (matrix_weights(config) - head) + attention_flops(config, (length + 1) / 2)
    return length * body + 2 * head


def decode_flops(config: ThinkerConfig, context: float) -> float:
    """Of one token that sees `context` tokens, itself included."""
    return 2 * matrix_weights(config) + attention_flops(config, context)


def decode_bytes(config: ThinkerConfig, dtype: str, streams: int, context: float) -> float:
    """Read in a step of one token for each of `streams`: the weights once, every stream's keys and values."""
    return weights_read(config, streams) * BYTES[dtype] + streams * context * cache_bytes(config, dtype)


def cache_bytes(config: ThinkerConfig, dtype: str) -> int:
    """Of the keys and values of one position, in all layers."""
    return config.n_layers * 2 * config.n_kv_heads * config.head_width * CACHED[dtype]


def _attention_weights(config: ThinkerConfig) -> int:
    return config.d_model * config.head_width * (2 * config.n_heads + 2 * config.n_kv_heads)


def _mlp_weights(config: ThinkerConfig) -> int:
    return config.d_model * config.d_ff * (3 if config.use_swiglu else 2)


def _router_weights(config: ThinkerConfig) -> int:
    return config.d_model * config.num_experts if config.use_moe else 0


def _head_weights(config: ThinkerConfig) -> int:
    return config.d_model * config.vocab_size


def _used(config: ThinkerConfig) -> int:
    return config.num_experts_per_tok if config.use_moe else 1
