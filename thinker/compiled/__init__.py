"""Plain Python compiled by Numba to machine code, once; kept on disk, and from then on run without Numba.

`library.py` keeps and runs it, `memory.py` is how compiled code looks at arrays. What is compiled lives where its
arithmetic belongs: `sampling_kernels.py` and `decode/native/`.
"""
