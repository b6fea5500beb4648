"""Speculative decoding (arXiv 2211.17192): float32's tokens, drafted by the same model in INT8 and checked together.

To read float32 weights takes most of a token's time, and to read them for eight rows hardly more than for one. So INT8,
which reads a quarter, draws the next few tokens first; then one pass of float32 over all of them says how many are
right. What is written is drawn from float32's logits with the text's own random numbers: it is what it would be
without, to the last byte, and only comes faster. INT8 attends to float32's keys and values, rounded to float16, since
they are read for each drafted token; what it writes behind them is replaced by what the check does.
"""

from __future__ import annotations

import contextlib

import numpy as np

from ...compiled.processor import LOW, TALL
from ...config import ThinkerConfig
from ...sampling import Draws, check_drawn
from .crew import Crew
from .layout import BLOCK, FLOAT16, FLOAT32, lay_out, sparse
from .model import BURST, Model
from .pace import seconds_of
from .packing import round_weights

LENGTHS = (LOW - 1, TALL - 1)  # of a draft: with the token before it, as many rows as the product takes at once
PATIENCE = 64  # tokens before the first draft, since getting ready for drafts takes as long as some 70
MEASURED = 0.015  # seconds for measuring what drafts of each length take
FEW = 4  # tokens without a draft whose time is measured
USUAL = 0.9  # the share of drafted tokens that are right, as long as nothing is known
WORTH = 1.05  # so much faster drafts have to be, as no smaller gain can be measured
MEMORY = 0.9  # of what was known before a check, so much counts after it
FORGOTTEN = 0.03  # and so much of it is lost in a call without drafts


class Drafts:
    """What drafts for a float32 `model`, with the same crew; made when some tokens have been written without."""

    def __init__(self, config: ThinkerConfig, model: Model, slots: int, crew: Crew) -> None:
        self._config, self._model, self._slots, self._crew = config, model, slots, crew
        self._draft: Model | None = None
        self._draws: Draws | None = None
        self._narrowed = [0] * slots  # of how many positions of each the draft's caches hold the text's keys and values
        self._waiting: float = PATIENCE
        if any(width % BLOCK for width in (config.d_model, config.d_ff, config.n_heads * config.head_width)):
            self._waiting = float("inf")  # INT8 has no such blocks
        self._seconds: dict[int, float] = {}  # of a draft of each length with its check; of a token without; or empty
        self._tried, self._right = 10.0, 10.0 * USUAL

    @property
    def ready(self) -> bool:
        """Whether there is something that drafts."""
        return bool(self._seconds)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from `length` on."""
        self._narrowed[slot] = min(self._narrowed[slot], length)

    def forget_seconds(self) -> None:
        """Measure anew, since the number of threads has changed."""
        self._seconds = {}

    def write(self, slot: int, held: int, token: int, draws: Draws, left: int, stop: np.ndarray) -> np.ndarray | None:
        """Append a token to the `held` ones of a slot and draw the next, at most `left`: int64 (k, 1).

        All but the last are appended too. None if that is better done without drafts, at least for a while.
        """
        if left == 1:  # nothing to foresee
            return None
        if not self.ready:
            self._waiting -= left
            if self._waiting > 0 or not self._prepare(slot, held, token):
                return None
        length = self._length()
        if not length:
            # Another text may be easier to foresee, so that drafts are worth a try some time.
            self._right += FORGOTTEN * (USUAL * self._tried - self._right)
            return None
        self._write(slot, held, token, draws, stop, length, min(left, BURST), BURST // (length + 1))
        job = self._model.job
        drawn = check_drawn(self._model.drawn[: int(job["done"]), None]).copy()
        self._narrowed[slot] = held + len(drawn)
        kept = MEMORY ** int(job["checked"])
        self._tried, self._right = kept * self._tried + int(job["tried"]), kept * self._right + int(job["right"])
        return drawn

    def _length(self) -> int:
        """How many tokens to draft now: what is likely to bring most tokens a second."""
        share = self._right / self._tried

        def speed(length: int) -> float:
            return sum(share**place for place in range(length + 1)) / self._seconds[length]

        best = max(self._seconds, key=speed)
        return best if speed(best) > WORTH * speed(0) else 0

    def _write(
        self,
        slot: int,
        held: int,
        token: int,
        draws: Draws,
        stop: np.ndarray,
        length: int,
        most: int,
        checks: int,
        *,
        paced: bool = True,
    ) -> None:
        """As `write`, in drafts of so many tokens, with so many `checks` at most, `most` tokens in all; unchecked."""
        assert self._draft is not None
        assert self._draws is not None
        self._model.draw_with(draws, stop)
        self._draft.draw_with(self._draws, stop)
        self._crew.place(1, slot, held, token)
        self._model.job["narrowed"], self._narrowed[slot] = self._narrowed[slot], held
        self._crew.write_ahead(self._model, self._draft, length, most, checks, paced=paced)

    def _prepare(self, slot: int, held: int, token: int) -> bool:
        """Round the weights, and measure what a draft and its check take: whether that could be done.

        It needs room behind the `held` tokens of a slot, and leaves keys and values there that mean nothing.
        """
        if held + max(*LENGTHS, FEW) + 1 > self._config.ctx_len:
            return False
        if self._draft is None:
            with contextlib.suppress(MemoryError, OSError):
                self._draft = self._rounded()
        if self._draft is None:
            self._waiting = float("inf")
            return False
        crew, none = self._crew, np.zeros(0, np.int64)
        crew.place(1, slot, held, token)
        crew.settle(self._draft, [crew.threads], MEASURED / 4)
        draws, self._draws = (Draws(self._slots, self._config.vocab_size) for _ in range(2))

        def turn(length: int) -> None:
            if length:
                self._write(slot, held, token, draws, none, length, length + 1, checks=1, paced=False)
            else:
                self._model.draw_with(draws, none)
                crew.place(1, slot, held, token)
                crew.do(self._model, 1, draw=1, turns=FEW, paced=False)

        # Not in turns: where the last cache holds float32's weights, a draft's would push them out for what follows.
        alone = seconds_of([0], turn, MEASURED / 3)[0] / FEW
        self._seconds = {0: alone} | seconds_of(LENGTHS, turn, MEASURED)
        return True

    def _rounded(self) -> Model | None:
        """The model that drafts; none if its weights are too large for INT8."""
        wide = self._model
        # All but the embedding, unless it is the head as well: of that, few numbers are read.
        matrices = int(wide.shape[0]["at_embedding"]) if wide.shape[0]["beside"] == 1 else wide.panels.weights.size
        rounded = round_weights(wide.panels, matrices)
        if rounded is None:
            return None
        shape, sizes = lay_out(self._config, True, self._crew.most, FLOAT16)
        room, piece = self._slots * sizes.slot, int(shape[0]["step_head_cache"])
        caches = sparse(room, np.int16, piece), sparse(room, np.int16, piece)
        draft = Model(shape, sizes, rounded, caches, self._crew.rows, self._crew.sync)
        shape["tokens_kind"], shape["vectors"] = FLOAT32, wide.shape["weights"]
        return draft
