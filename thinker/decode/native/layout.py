"""Where everything lies: a model's sizes, and the places of its weights, caches and work space in a few flat arrays.

The kernels read one record, `SHAPE`, which holds counts, addresses (of arrays that a `Model` keeps alive) and places
(in elements from such an address). Heads, hidden layers and the vocabulary are padded to whole panels. How tensors
get there is `packing.py`'s business.
"""

# D d_model, H query heads, G key/value heads, F d_ff, E experts, K experts per token

from __future__ import annotations

import contextlib
import mmap
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiled.processor import DOTS, FETCHED
from ...compiled.processor import PANEL as PANEL  # for all who lay panels out or read them
from ...compiled.processor import PIECE as PIECE
from ...config import ThinkerConfig

BLOCK = 32  # inputs whose products are added up by themselves; in INT8 they share a scale
ROWS = 64  # rows of one pass: a block of a prompt, or one token each of so many slots
CHUNK = 128 // PANEL  # panels that one product makes before its results are used
GROUP = 4 if DOTS else 2  # inputs of an output that lie together in INT8, as the processor multiplies and adds them
QUERIES = 8  # rows of a prompt that attend together
LINE = 16  # elements of a cache line of float32
PIECES = FETCHED // PIECE  # of them that a thread lists for one layer
MANY_ROWS = 8  # from here on products are long enough for meetings, and for memory to bring something meanwhile
SHORT = 1 << 18  # bytes of one head's keys that are allotted at once, however few come
STRIDE = 16  # words from one thread's to the next: two cache lines, as processors fetch them in pairs
# Which of a thread's words says how it is, where the bell is that wakes it, and where its job; 0 counts meetings.
STATE, BELL, TASK = 1, 2, 3
ASLEEP, READY, BUSY, ENDED = range(4)  # how a helper is
FLOAT32, Q8, FLOAT16 = range(3)  # what the panels of a product are made of
ACTIVATIONS = ("silu", "gelu", "relu", "relu2")

_COUNTS = """layers d_model d_ff heads groups width vocab experts chosen gated mixture qk_norm kind cached
    tokens_kind beside activation capacity abreast ahead head_panels ff_panels model_panels vocab_panels
    head_width ff_width vocab_width"""
_ADDRESSES = """product network sampler weights scales floats vectors keys values x q y hidden logits own plan
    slots places tokens sync"""
_PLACES = """at_layers step_layer at_out at_up step_up at_down step_down at_embedding at_head
    at_cos at_sin at_norm at_layer_floats step_layer_floats at_norm2 at_q_norm at_k_norm at_router
    step_slot step_layer_cache step_head_cache
    step_own at_rounded step_rounded at_gathered at_shares at_tile at_scores at_draw
    step_plan at_source at_pair at_first at_ahead"""
SHAPE = np.dtype(
    [(name, np.int64) for name in (_COUNTS + " " + _ADDRESSES + " " + _PLACES).split()]
    + [("eps", np.float32), ("scale", np.float32)]
)

# What to do, for all threads: with which model, by the address of its record; how many rows and threads; `together`
# neighbours of one slot attend together (1 if each row has a slot of its own); logits from which row on; `traced`
# positions to be kept for a person to see, 0 for none; whether x is there already (embeddings); how many turns; and,
# if the next token is to be drawn and run in the following turn, the addresses of `sampling.Draws` and of stop ids, and
# of the drawn ids, (turns, n), of which so many turns were done. To write ahead (`turns.py`), the address of the job
# that drafts, so many tokens a time, how many checks at most, and how many positions' keys and values its own caches
# have; what comes back is how many checks there were, and of how many drafted tokens that were compared with what was
# drawn how many were right.
_JOB = """shape rows threads together logits_from traced seen_attention seen_experts seen_shares seen_norms
    embedded turns draw settings keys seen stop stops drawn done draft length checks narrowed checked tried right"""
JOB = np.dtype([(name, np.int64) for name in _JOB.split()])


def panels(outputs: int) -> int:
    """How many panels hold so many outputs."""
    return -(-outputs // PANEL)


def aligned(size: int, dtype: Any) -> np.ndarray:
    """Zeros, flat, from the beginning of a cache line on, so that no vector lies across two; memory comes with use."""
    line, width = LINE * 4, np.dtype(dtype).itemsize
    raw = np.zeros(size * width + line, np.uint8)
    start = -raw.ctypes.data % line
    return raw[start : start + size * width].view(dtype)


def sparse(size: int, dtype: Any, piece: int) -> np.ndarray:
    """The same for caches, whose pieces of so many elements fill slowly, each from its beginning.

    Little of a long one may ever be used, and a huge page would come whole; short ones are read faster from huge pages.
    """
    width = np.dtype(dtype).itemsize
    if sys.platform != "linux":
        return np.frombuffer(mmap.mmap(-1, size * width), dtype)
    memory = mmap.mmap(-1, size * width, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked child writes into its own
    with contextlib.suppress(OSError):  # a kernel without huge pages takes no advice about them
        memory.madvise(mmap.MADV_HUGEPAGE if piece * width <= SHORT else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype)


class Places:
    """Hands out places in a flat array one after another, each at the beginning of a cache line."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        """The place of the next `size` elements."""
        at = self.size
        self.size += -(-size // 64) * 64
        return at


@dataclass(frozen=True)
class Sizes:
    """Elements of the flat arrays."""

    weights: int
    floats: int
    slot: int  # of keys, and of values, for one slot
    work: int
    plan: int


def lay_out(config: ThinkerConfig, quantised: bool, threads: int, cached: int) -> tuple[np.ndarray, Sizes]:
    """The record for a model, (1,) of `SHAPE`, all but its addresses, and the sizes of what they will point to.

    Weights and caches may be of different types; places of weights and floats are the same for both types of weights.
    """
    record = np.zeros(1, SHAPE)
    s = record[0]
    D, F, H, G, width = config.d_model, config.d_ff, config.n_heads, config.n_kv_heads, config.head_width
    E, K = (config.num_experts, config.num_experts_per_tok) if config.use_moe else (1, 1)
    counts = {
        "layers": config.n_layers,
        "d_model": D,
        "d_ff": F,
        "heads": H,
        "groups": G,
        "width": width,
        "vocab": config.vocab_size,
        "experts": E,
        "chosen": K,
        "gated": config.use_swiglu,
        "mixture": config.use_moe,
        "qk_norm": config.use_qk_norm,
        "kind": Q8 if quantised else FLOAT32,
        "cached": cached,
        "tokens_kind": Q8 if quantised else FLOAT32,
        "beside": PANEL if config.tie_embeddings else 1,
        "activation": ACTIVATIONS.index(config.activation_name),
        "capacity": panels(config.ctx_len) * PANEL,
        "abreast": CHUNK,
    }
    for name, value in counts.items():
        s[name] = value
    for name, value in (("head", width), ("ff", F), ("model", D), ("vocab", config.vocab_size)):
        s[f"{name}_panels"] = panels(value)
        if name != "model":
            s[f"{name}_width"] = panels(value) * PANEL
    s["eps"], s["scale"] = config.norm_eps, 1 / np.sqrt(width)
    head_width, ff_width, vocab_width = int(s["head_width"]), int(s["ff_width"]), int(s["vocab_width"])
    together = max(QUERIES, H // G)

    # Weights: layers of (q, k, v heads | out_proj | experts' gate and up panels in turn | their down), head, embedding.
    # Its vectors lie one after another, `beside` is 1, unless they are the head's and lie across its panels.
    layer = Places()
    layer.take((H + 2 * G) * head_width * D)
    s["step_up"], s["step_down"] = (1 + config.use_swiglu) * ff_width * D, panels(D) * PANEL * F
    s["at_out"] = layer.take(panels(D) * PANEL * H * width)
    s["at_up"], s["at_down"] = layer.take(E * int(s["step_up"])), layer.take(E * int(s["step_down"]))
    weights = Places()
    s["step_layer"], s["at_layers"] = layer.size, weights.take(config.n_layers * layer.size)
    s["at_head"] = weights.take(vocab_width * D)
    s["at_embedding"] = s["at_head"] if config.tie_embeddings else weights.take(vocab_width * D)

    # Floats: RoPE's tables, the last norm, layers of (norm1 | norm2 | q_norm | k_norm | router).
    layer = Places()
    layer.take(D)
    s["at_norm2"], s["at_q_norm"], s["at_k_norm"] = layer.take(D), layer.take(width), layer.take(width)
    s["at_router"] = layer.take(panels(E) * PANEL * D)
    floats = Places()
    s["at_cos"], s["at_sin"] = (floats.take(config.ctx_len * (width // 2)) for _ in range(2))
    s["at_norm"] = floats.take(D)
    s["step_layer_floats"], s["at_layer_floats"] = layer.size, floats.take(config.n_layers * layer.size)

    # Caches: keys (slot, layer, group, position / PANEL, width, position % PANEL), since scores are a product whose
    # outputs are positions; values (slot, layer, group, dimension / PANEL, position, dimension % PANEL).
    # Both are float16 beside weights in INT8: with many streams most of what a step reads is theirs.
    s["step_head_cache"] = int(s["capacity"]) * head_width
    s["step_layer_cache"] = G * int(s["step_head_cache"])
    s["step_slot"] = config.n_layers * int(s["step_layer_cache"])

    # Work that threads share, addresses for now counted from 0; then what each has of its own.
    work = Places()
    s["x"], s["q"], s["y"] = work.take(ROWS * D), work.take(ROWS * H * head_width), work.take(ROWS * H * width)
    s["hidden"], s["logits"] = work.take(ROWS * K * ff_width), work.take(ROWS * vocab_width)
    own = Places()
    own.take(ROWS * D)
    if quantised:
        # Bytes of a rounded row: 16 bits an input, then 32 and 32 for each block, which `rows.py` explains.
        widest = panels(max(D, H * width, F)) * PANEL
        s["step_rounded"] = 2 * widest + 2 * 4 * (widest // BLOCK)
        s["at_rounded"] = own.take(ROWS * K * int(s["step_rounded"]) // 4)
    s["at_gathered"], s["at_shares"] = own.take(ROWS * K * D), own.take(ROWS * K)
    widest = max(K * CHUNK * PANEL, head_width, panels(E) * PANEL)
    s["at_tile"] = own.take(max(ROWS * widest, together * head_width))
    s["at_scores"] = own.take(together * int(s["capacity"]))
    s["at_draw"] = own.take(3 * vocab_width)
    s["step_own"], s["own"] = own.size, work.take(threads * own.size)
    plan = Places()
    s["at_source"], s["at_pair"], s["at_first"] = plan.take(ROWS * K), plan.take(ROWS * K), plan.take(E + 1)
    # Of what to fetch ahead: two counts, the list, and behind it as many places as one product could take.
    s["ahead"] = 2 + PIECES + -(-max(D, F, H * width, int(s["capacity"])) // BLOCK)
    s["at_ahead"] = plan.take(int(s["ahead"]))
    s["step_plan"] = plan.size
    return record, Sizes(weights.size, floats.size, int(s["step_slot"]), work.size, threads * plan.size)
