"""Who does a job and on which rows: a team's threads, how many of them for what, and the rows they are given.

Whose weights and caches those are is a `Model`'s business; several models may take turns with one crew.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from itertools import product as product_of

import numpy as np
from numpy.typing import ArrayLike

from ...compiled.processor import processors
from .layout import CHUNK, MANY_ROWS, QUERIES, ROWS
from .model import Model
from .pace import Pace, fastest
from .team import Team

MOST = 16  # threads: more only wait for each other at this size of model
AGAIN = 2048  # tokens after which fewer threads than there are must prove the faster ones again, then twice as many, …


class Crew:
    """Threads for the jobs of one decoder: `threads` of them for few rows, or as many as are fastest if that is None.

    `rows` is what the kernels read: int64 (3, ROWS), the slot of each row, its place there and its token.
    """

    def __init__(self, threads: int | None) -> None:
        self.most = threads or min(processors(), MOST)
        self.threads = self.most
        self.rows = np.zeros((3, ROWS), np.int64)
        self._team = Team(self.most)
        self.sync = self._team.address
        self._pace = Pace() if threads is None else None
        self._again = self._left = AGAIN

    def place(self, n: int, slots: ArrayLike, places: ArrayLike, tokens: ArrayLike) -> None:
        """Put n tokens into the rows: of each of the three one number for all, or n."""
        self.rows[0, :n], self.rows[1, :n], self.rows[2, :n] = slots, places, tokens

    def do(
        self,
        model: Model,
        rows: int,
        *,
        together: int = 1,
        logits_from: int = 0,
        embedded: bool = False,
        draw: int = 0,
        turns: int = 1,
        paced: bool = True,
    ) -> None:
        """One job: see `layout.JOB`. What is `paced` goes on with one thread for a while after others stalled."""
        job = model.job
        job["rows"], job["together"], job["logits_from"], job["embedded"] = rows, together, logits_from, embedded
        job["draw"], job["turns"], job["done"], job["draft"] = draw, turns, 1, 0
        self._hand_out(model, rows, (model.task, rows, together) if paced else None, "done")

    def write_ahead(
        self, model: Model, draft: Model, length: int, turns: int, checks: int, *, paced: bool = True
    ) -> None:
        """Another: up to `turns` tokens of the first row's slot, in drafts of `length` by another model and checks."""
        job = draft.job
        job["rows"], job["together"], job["logits_from"], job["draw"] = 1, 1, 0, 1
        job = model.job
        job["together"], job["logits_from"], job["embedded"], job["turns"] = QUERIES, 0, 0, turns
        job["draft"], job["length"], job["checks"], job["tried"], job["right"] = draft.task, length, checks, 0, 0
        self._hand_out(model, 1, (model.task, "ahead", length) if paced else None, "checked")

    def _hand_out(self, model: Model, rows: int, kind: Hashable | None, count: str) -> None:
        """Have a model's job done by as many threads as are best; `count` names what says how many turns it took."""
        job = model.job
        # Few rows are little work between two meetings, so that fewer threads may be faster; many rows never are.
        wanted = self.most if rows >= MANY_ROWS else self.threads
        if self._pace is None or kind is None:
            job["threads"] = wanted
            self._team.do(model.task)
            return
        job["threads"] = threads = self._pace.begin(wanted)
        start = time.perf_counter()
        self._team.do(model.task)
        self._pace.end(threads, kind, (time.perf_counter() - start) / int(job[count]))

    def settle(self, model: Model, counts: Sequence[int] = (), seconds: float = 0.02) -> None:
        """Measure how many threads (of `counts`, or any) and how many panels abreast make a token of a model fastest.

        The token is the first row's: its keys and values are written where it says.
        """

        def one_token(choice: tuple[int, int]) -> None:
            self.threads, model.shape["abreast"] = choice
            self.do(model, 1, paced=False)

        counts = counts or [*(few for few in (1, 2, 4, 8) if few < self.most), self.most]
        chosen = self.threads, int(model.shape["abreast"][0])
        try:
            chosen = fastest(product_of(counts, (CHUNK, 1)), one_token, seconds)
        finally:  # as it was before, if Ctrl-C comes in between
            self.threads, model.shape["abreast"] = chosen

    def doubts(self, tokens: int) -> bool:
        """Whether to settle again before so many more tokens: another program may have been busy the last time."""
        if self._pace is None or self.threads == self.most:
            return False
        self._left -= tokens
        if self._left > 0:
            return False
        self._again = self._left = 2 * self._again
        return True
