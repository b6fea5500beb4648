"""Tensors of a file, by name, into the parameters of a module."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn


@torch.no_grad()
def load_parameters(module: nn.Module, tensors: Mapping[str, ArrayLike], where: str) -> None:
    """Copy a tensor into each parameter, into one that is shared once.

    `where` they come from begins the line of the `ValueError` that is raised if names or shapes differ.
    """
    parameters = dict(module.named_parameters())
    if odd := sorted(parameters.keys() ^ set(tensors)):
        raise ValueError(f"{where}: has other parameters than the model, {len(odd)} of them, {odd[0]} first")
    for name, parameter in parameters.items():
        values = np.array(tensors[name], np.float32)
        if values.shape != tuple(parameter.shape):
            raise ValueError(f"{where}: {name} is {values.shape}, in the model {tuple(parameter.shape)}")
        parameter.copy_(torch.from_numpy(values))
