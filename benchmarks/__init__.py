"""Comparisons with other programs. No part of the package `thinker`, which doesn't know of them.

`turns.py` lets contestants take turns, each in a process of its own (`worker.py`, `contestants/`); `train_step.py`,
`decode.py` and `growth.py` say who meets whom and which line of the table follows from it; `run.py` runs them and
writes RESULTS.md. `make -C benchmarks` does all, from nothing.
"""
