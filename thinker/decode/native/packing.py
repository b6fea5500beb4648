"""From a model's tensors to the kernels' layout: panels of outputs side by side, padded with zeros.

Tensors of any float type or in Q8_0 come in by Thinker's names, one after another, so that never more than one is held
twice. Panels of gate and up alternate, so that one pass makes both. What the places are is `layout.py`'s business.
"""

# D d_model, H query heads, G key/value heads, N rows (outputs) and k columns (inputs) of a matrix, P panels

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.reader import widen
from ...config import ThinkerConfig
from ...formats.q8 import BLOCK, Q8Tensor
from ...rope import rope_tables
from ..decoder import Weights
from .kernels import round_panels
from .layout import GROUP, PANEL, Q8, Sizes, aligned, panels


@dataclass
class Panels:
    """A model's tensors: `weights` in float32, or int8 with `scales`, and what stays float32 in `floats`."""

    weights: np.ndarray
    scales: np.ndarray
    floats: np.ndarray


class Packed(Panels):
    """The tensors of a model's files."""

    def __init__(self, files: Weights, shape: np.ndarray, sizes: Sizes) -> None:
        quantised = bool(shape[0]["kind"] == Q8)
        self.tensors, self.quantised = files.tensors, quantised
        self.weights = aligned(sizes.weights, np.int8 if quantised else np.float32)
        # The bits of float16, since not every processor computes with it.
        self.scales = aligned(sizes.weights // BLOCK if quantised else 1, np.int16)
        self.floats = aligned(sizes.floats, np.float32)
        config, s = files.config, shape[0]
        for at, table in zip((s["at_cos"], s["at_sin"]), rope_tables(config), strict=True):
            self.keep(at, table)
        self.keep(s["at_norm"], self.tensors["norm.scale"])
        self.pack(s["at_embedding"], "tok_emb.weight", beside=int(s["beside"]))
        if not config.tie_embeddings:
            self.pack(s["at_head"], "head.weight")
        for layer in range(config.n_layers):
            block = f"blocks.{layer}"
            self.pack_block(config, s, block, s["at_layers"] + layer * s["step_layer"])
            self.keep_block(config, s, block, s["at_layer_floats"] + layer * s["step_layer_floats"])

    def pack_block(self, config: ThinkerConfig, s: Any, block: str, at: int) -> None:
        """The matrices of one layer, from `at` on. Heads are padded one by one."""
        H, G = config.n_heads, config.n_kv_heads
        if config.use_gqa:
            for name, first, heads in (("q", 0, H), ("k", H, G), ("v", H + G, G)):
                start = at + first * s["head_width"] * config.d_model
                self.pack(start, f"{block}.attn.{name}.weight", parts=heads)
        else:
            self.pack(at, f"{block}.attn.qkv.weight", parts=3 * H)
        self.pack(at + s["at_out"], f"{block}.attn.out_proj.weight", factor=f"{block}.scale1")
        up, down = at + s["at_up"], at + s["at_down"]
        every = 2 if config.use_swiglu else 1
        if config.use_moe:
            experts = f"{block}.moe.experts"
            self.pack(up, f"{experts}.gate_proj", step=s["step_up"], every=2)
            self.pack(up, f"{experts}.up_proj", step=s["step_up"], every=2, first=1)
            self.pack(down, f"{experts}.down_proj", step=s["step_down"], factor=f"{block}.scale2")
            return
        if config.use_swiglu:
            self.pack(up, f"{block}.mlp.gate_proj.weight", every=2)
        self.pack(up, f"{block}.mlp.up_proj.weight", every=every, first=every - 1)
        self.pack(down, f"{block}.mlp.down_proj.weight", factor=f"{block}.scale2")

    def keep_block(self, config: ThinkerConfig, s: Any, block: str, at: int) -> None:
        """The norms and the router of one layer, from `at` on."""
        self.keep(at, self.tensors[f"{block}.norm1.scale"])
        self.keep(at + s["at_norm2"], self.tensors[f"{block}.norm2.scale"])
        if config.use_qk_norm:
            self.keep(at + s["at_q_norm"], self.tensors[f"{block}.attn.q_norm.scale"])
            self.keep(at + s["at_k_norm"], self.tensors[f"{block}.attn.k_norm.scale"])
        if config.use_moe:
            router = widen(self.tensors[f"{block}.moe.router.weight"])
            count = panels(config.num_experts)
            size = count * PANEL * config.d_model
            to_panels(self.floats[at + s["at_router"] :][:size].reshape(count, -1, PANEL, 1), router)

    def keep(self, at: int, values: Any) -> None:
        """A vector or table as it is, in float32."""
        self.floats[at : at + values.size] = widen(values).reshape(-1)

    def pack(
        self,
        at: int,
        name: str,
        *,
        step: int = 0,
        parts: int = 1,
        every: int = 1,
        first: int = 0,
        beside: int = PANEL,
        factor: str = "",
    ) -> None:
        """Panels of the matrix `name` (N, k) from `at` on, of so many rows `beside`; of a stack (E, N, k) `step` apart.

        Its rows may form `parts` that are padded one by one. `every` 2 leaves every second panel to another matrix,
        beginning with panel `first`. `factor` names a vector that scales the outputs, if there is one of that name.
        """
        tensor = self.tensors[name]  # once, since files may put a stack together each time that it is asked for
        k = tensor.shape[-1]
        if self.quantised and k % BLOCK:
            raise ValueError(f"{name} has {k} inputs, and INT8 has blocks of {BLOCK}: use dtype float32")
        scale = widen(self.tensors[factor])[:, None] if factor in self.tensors else None
        for index, matrix in enumerate([tensor] if len(tensor.shape) == 2 else tensor):
            if scale is not None:
                matrix = widen(matrix) * scale
            if not self.quantised:
                layers = [(self.weights, widen(matrix), 1, 1)]
            else:
                quants, scales = as_q8(matrix)
                # Bytes without a sign, as `rows.to_int16` explains.
                signless = quants ^ np.int8(-128)
                layers = [(self.weights, signless, 1, GROUP), (self.scales, scales.view(np.int16), BLOCK, 1)]
            rows = matrix.shape[0] // parts
            count = -(-rows // beside)
            for target, source, block, group in layers:
                depth, start = k // block, (at + index * step) // block
                size = count * every * depth * beside
                for part in range(parts):
                    place = target[start + part * size : start + (part + 1) * size]
                    place = place.reshape(count, every, depth // group, beside, group)
                    to_panels(place[:, first], source[part * rows : (part + 1) * rows])


def round_weights(wide: Panels, size: int) -> Panels | None:
    """The first float32 weights in INT8, whose blocks of inputs must be whole; None if too large for its scales."""
    scratch = np.zeros(2 * PANEL, np.float32)
    weights, scales = aligned(size, np.int8), aligned(size // BLOCK, np.int16)
    addresses = (array.ctypes.data for array in (weights, scales, scratch))
    fits = round_panels(wide.weights.ctypes.data, size, *addresses)
    return Panels(weights, scales, wide.floats) if fits else None


def to_panels(target: np.ndarray, rows: np.ndarray) -> None:
    """Copy (N, k) into panels (P, k / group, `beside`, group); what is beyond N stays as it is."""
    _, depth, beside, group = target.shape
    whole = len(rows) // beside
    target[:whole] = rows[: whole * beside].reshape(whole, beside, depth, group).transpose(0, 2, 1, 3)
    if len(rows) % beside:
        rest = rows[whole * beside :]
        target[whole, :, : len(rest)] = rest.reshape(len(rest), depth, group).transpose(1, 0, 2)


def as_q8(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """Any matrix (N, k) as int8 (N, k) and float16 scales (N, k / 32); Q8_0 is taken without another rounding."""
    tensor = array if isinstance(array, Q8Tensor) else Q8Tensor.quantise(array)
    return tensor.quants, tensor.scales
