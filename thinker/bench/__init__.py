"""Speed beside what the machine could do: `thinker bench`.

`costs.py` says what a model's work costs by arithmetic, `limits.py` measures what the machine can do, `speed.py` what
the model reaches. Comparisons with other programs are in `benchmarks/`, which is no part of the package.
"""
