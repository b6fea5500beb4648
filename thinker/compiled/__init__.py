"""Plain Python compiled by Numba to machine code, once; kept on disk, and from then on run without Numba.

`library.py` keeps and runs it, `memory.py` is how compiled code looks at arrays, `calls.py` how one kernel calls
another, `vectors.py` what Numba's own loops lack, `atomics.py` how threads hear from each other, `shares.py` how they
share work, `processor.py` what there is to compile for. What is compiled lives where its arithmetic belongs:
`sampling_kernels.py`, `fused/` and `decode/native/`.
"""
