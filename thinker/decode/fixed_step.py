"""A step of one token for all slots at fixed addresses: what an accelerator records once and replays as one graph.

Decoding a small model there is launches, not arithmetic: some 140 a token, of which a CUDA graph makes one. On a
processor the same step runs without a graph, which is how it is tested; there `TorchDecoder` prefers a growing view.
"""

# B slots in the cache, n of them advance, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache import FixedCache, KVCache
from ..model import ThinkerLM

WARM_UP = 3  # steps before recording, in which libraries choose their algorithms and take their work space


class FixedStep:
    """The step of a model, in eval mode, over the memory of one cache. It writes to that memory and counts nothing."""

    def __init__(self, model: ThinkerLM, cache: KVCache) -> None:
        self.model, self.memory = model, cache
        device, rows = cache.keys.device, len(cache.lengths)
        self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        filled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = FixedCache(cache.keys, cache.values, filled, torch.zeros(rows, dtype=torch.bool, device=device))
        self.graph = self.logits = None
        if device.type == "cuda" and not model.config.use_moe:  # experts' counts may have to be read back
            self.graph, self.logits = self._record()

    def __call__(self, slots: np.ndarray, ids: np.ndarray, lengths: Sequence[int]) -> Tensor:
        """One token to each of n slots, when the B slots hold so many: (n, V)."""
        self.ids[slots, 0] = torch.from_numpy(ids).to(self.ids.device)
        self.cache.filled.copy_(torch.tensor(lengths))
        self.cache.active.zero_()[slots] = True
        if self.graph is None:
            return self._logits()[slots]
        assert self.logits is not None
        self.graph.replay()
        return self.logits[slots]

    def _logits(self) -> Tensor:
        hidden = self.model.features(self.ids, kv_cache=self.cache)
        assert isinstance(hidden, Tensor)
        return self.model.head(hidden[:, 0])

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and where it puts its logits, (B, V). No slot is active while this is made."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._logits()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._logits()
        return graph, logits
