"""Parts of training as single operations of our own: in bfloat16 for processors that multiply that, else in float32.

Each is equal to a plain form beside the network, gradients too, and is chosen there: `attention.py`, `gating.py`
(SwiGLU's activation), `norm.py`, `products.py`, `weights.py` (their gradients) and `cross_entropy.py` are what torch
calls, as `operations.py` tells it; their `_kernels.py` what Numba compiles for them. `attention_rows.py` is what
happens between two products. The rest is what kernels are made of: `tiles.py` products, `moves.py` rows brought into
the order that products want, `numbers.py` their numbers, `threads.py` torch's own threads. `kernels.py` says whether
there are any, and has them done.
"""
