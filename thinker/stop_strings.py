"""Where a text ends that comes in pieces: at the first stop string, wherever its pieces were cut.

Only text is looked at. Ends by token and by length are `generate.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text in, text out up to the stop string that is complete first, however the text was cut into pieces.

    Only what may be the beginning of a stop string is held back. With "\\n\\n" a newline waits, and comes out together
    with the next character unless that is a newline too. Of stop strings that end at the same place the longest counts.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to belong to the text now."""
        self._held += text
        hits = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            end = min(hits)[1]
        else:
            end = len(self._held) - self._beginning()
        said, self._held = self._held[:end], "" if self.found else self._held[end:]
        return said

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        said, self._held = self._held, ""
        return said

    def _beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stop), default=0) - 1)
        ends = (self._held[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)
