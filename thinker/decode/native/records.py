"""The records of `layout.py` as compiled code looks at them, by their addresses: whoever has a job has all else."""

from __future__ import annotations

from numba import from_dtype

from ...compiled.memory import view_of
from .layout import JOB, SHAPE

shapes, jobs = view_of(from_dtype(SHAPE)), view_of(from_dtype(JOB))
