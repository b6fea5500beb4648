"""A model as the kernels read it: its record, the arrays that the record leads to, and the job that is to be done.

What the job is to be is `decoder.py`'s business; which array lies where is `layout.py`'s.
"""

# D d_model, V vocab_size

from __future__ import annotations

import numpy as np

from ...sampling import Draws, draw_rows
from .kernels import network, product
from .layout import JOB, ROWS, Sizes, aligned
from .packing import Panels

BURST = 32  # tokens of one compiled call


class Model:
    """Weights, work space and job of one model. `caches` are keys and values; `rows` and `sync` are its crew's."""

    def __init__(
        self,
        shape: np.ndarray,
        sizes: Sizes,
        panels: Panels,
        caches: tuple[np.ndarray, np.ndarray],
        rows: np.ndarray,
        sync: int,
    ) -> None:
        self.shape, self.panels, self.caches, self._rows = shape, panels, caches, rows
        self._work, self.plan = aligned(sizes.work, np.float32), aligned(sizes.plan, np.int64)
        self.drawn = np.zeros(ROWS * BURST, np.int64)
        s = shape[0]
        work = self._work.ctypes.data
        for name in ("x", "q", "y", "hidden", "logits", "own"):
            s[name] = work + 4 * s[name]  # laid out from 0
        arrays = (panels.weights, panels.scales, panels.floats, *caches, self.plan, *rows)
        names = ("weights", "scales", "floats", "keys", "values", "plan", "slots", "places", "tokens")
        for name, array in zip(names, arrays, strict=True):
            s[name] = array.ctypes.data
        s["vectors"] = s["weights"]
        s["sync"] = sync
        for name, kernel in (("product", product), ("network", network), ("sampler", draw_rows)):
            s[name] = kernel.prepare()
        s["step_own"] *= 4  # from here on in bytes, as they are added to addresses
        s["step_plan"] *= 8
        self._jobs = np.zeros(1, JOB)
        self.job, self.task = self._jobs[0], self._jobs.ctypes.data
        self.job["shape"], self.job["drawn"] = shape.ctypes.data, self.drawn.ctypes.data
        self._draws: Draws | None = None
        self._stop: np.ndarray | None = None
        self.x, self.logits = self._view("x", "d_model"), self._view("logits", "vocab_width")

    def draw_with(self, draws: Draws, stop: np.ndarray) -> None:
        """Draw from this table, and end at one of the ids of int64 `stop`, from the next job on."""
        if draws is not self._draws:
            self._draws = draws
            for name in ("settings", "keys", "seen"):
                self.job[name] = getattr(draws, name).ctypes.data
        if stop is not self._stop:
            self._stop = stop
            self.job["stop"], self.job["stops"] = stop.ctypes.data, stop.size

    def _view(self, name: str, width: str) -> np.ndarray:
        """A part of the work space, one line a row."""
        start, size = (int(self.shape[0][name]) - self._work.ctypes.data) // 4, int(self.shape[0][width])
        return self._work[start : start + ROWS * size].reshape(ROWS, size)
