"""Running a model token by token: what generation asks of it (`decoder.py`), and who computes it.

`torch_decoder.py` runs the readable model on any device, `native/` runs kernels compiled for this processor. This file
imports neither: a process that decodes natively must not load torch.
"""
