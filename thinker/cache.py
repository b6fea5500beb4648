"""The key/value cache: memory of what a sequence has already been asked, so that each token is computed once.

It is an argument of the forward, never hidden state. `Attention` appends to it layer by layer; the lengths advance
once, after the last block. Native decoding keeps its own, in `decode/native/`.
"""

# B batch, T new tokens, S cached + new, G key/value heads, C capacity = ctx_len

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import ThinkerConfig


@dataclass
class KVCache:
    """Keys and values of every layer, preallocated: two tensors (n_layers, B, G, C, head_dim).

    `lengths[b]` positions of row b are filled. Rows may differ in length: with lengths [3, 1], one new token each goes
    to columns 3 and 1, the forward attends over 4 columns, and row 1 sees the first 2 of them. It is for inference:
    with gradients switched on, autograd would keep every step.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, config: ThinkerConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> KVCache:
        """A cache for `batch` rows of up to `ctx_len` positions."""
        shape = (config.n_layers, batch, config.n_kv_heads, config.ctx_len, config.head_width)
        # Zeros, not empty: a masked NaN would still spread through 0 * NaN.
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, [0] * batch)

    @property
    def capacity(self) -> int:
        """Positions that each row has room for."""
        return self.keys.shape[3]

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return min(self.lengths) != max(self.lengths)

    def rows(self, start: int, end: int) -> KVCache:
        """Rows start to end - 1, sharing memory with this cache; their lengths are their own."""
        return KVCache(self.keys[:, start:end], self.values[:, start:end], self.lengths[start:end])

    def check_room(self, new: int) -> None:
        """Raise `ValueError` when `new` more positions don't fit."""
        if max(self.lengths) + new > self.capacity:
            raise ValueError(
                f"{max(self.lengths)} cached + {new} new positions exceed ctx_len {self.capacity}: "
                "shorten the text, or load the model with a larger ctx_len"
            )

    def columns(self, new: int) -> Tensor:
        """Where the next `new` positions of each row go: (B, new)."""
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(new, device=self.keys.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, T, head_dim) behind each row's filled part; return all so far, (B, G, S, head_dim)."""
        new = k.shape[2]
        end = max(self.lengths) + new
        if self.ragged:
            rows, columns = torch.arange(len(self.lengths), device=k.device)[:, None], self.columns(new)
            # Indices around a slice move to the front: (B, T, G, head_dim).
            self.keys[layer][rows, :, columns] = k.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, columns] = v.transpose(1, 2).to(self.values.dtype)
        else:
            self.keys[layer, :, :, end - new : end] = k
            self.values[layer, :, :, end - new : end] = v
        return self.keys[layer, :, :, :end].to(k.dtype), self.values[layer, :, :, :end].to(v.dtype)

    def advance(self, new: int) -> None:
        """Count `new` positions as filled: once per forward, after the last block."""
        self.lengths = [length + new for length in self.lengths]

    def truncate(self, row: int, length: int) -> None:
        """Forget what row `row` holds from position `length` on."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} holds {self.lengths[row]} positions and can't be cut to {length}")
        self.lengths[row] = length


@dataclass(frozen=True)
class FixedCache:
    """The memory of a `KVCache` for steps of one token a row, in which only the contents of tensors ever change.

    So a step does the same to the same addresses each time, and an accelerator can record it once and replay it. A row
    attends over all its capacity, behind a mask. `filled` (B,) counts each row's positions, and whoever calls moves it
    on; a row that is not `active` (B,) computes along, and its memory stays as it is.
    """

    keys: Tensor
    values: Tensor
    filled: Tensor
    active: Tensor

    @property
    def columns(self) -> Tensor:
        """Where each row's new position is, (B, 1). A full row is not active, but has to compute along somewhere."""
        return self.filled.clamp(max=self.keys.shape[3] - 1)[:, None]

    def places(self) -> tuple[Tensor, Tensor]:
        """The new tokens' positions, (B, 1), and what they see, (B, 1, 1, C)."""
        everywhere = torch.arange(self.keys.shape[3], device=self.keys.device)
        return self.columns, (everywhere <= self.columns)[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, G, 1, head_dim) behind each row's filled part; return all, (B, G, C, head_dim)."""
        rows, columns = torch.arange(len(self.filled), device=k.device), self.columns[:, 0]
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            old = memory[rows, :, columns]  # (B, G, head_dim)
            memory[rows, :, columns] = torch.where(self.active[:, None, None], new[:, :, 0].to(old.dtype), old)
        return self.keys[layer].to(k.dtype), self.values[layer].to(v.dtype)

    def advance(self, new: int) -> None:
        """Nothing: a replay would not count along."""


Cache = KVCache | FixedCache
