"""Types of flags, in forms that tyro knows by itself.

About `list[str]` and `int | None` it asks typeguard, whose import takes a tenth of what a short answer takes in all. So
commands that answer write `Texts` and `Maybe[int]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, Union

import tyro

Value = TypeVar("Value")

Flag = tyro.conf.FlagCreatePairsOff  # one that is there or not
Maybe = Union[Value, None]  # noqa: UP007
if TYPE_CHECKING:
    Texts = list[str]
else:
    Texts = list  # of texts, as nothing else is said
