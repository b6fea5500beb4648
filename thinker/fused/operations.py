"""How functions of this room become operations that torch compiles around.

They are registered by hand, and have their gradients in a `torch.autograd.Function`: what `torch.library.custom_op`
and `register_autograd` make costs each call 50 and some 200 microseconds, more than all that is done in Python besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

NAMESPACE = "thinker"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # operations live as long as it does

Function = TypeVar("Function", bound=Callable[..., Any])

MEANWHILE: dict[Any, Callable[..., int]] = {}  # bytes that operations take while they work, of their arguments


def operation(
    name: str, empty: Callable[..., Any], changed: Iterable[str] = (), meanwhile: Callable[..., int] | None = None
) -> Callable[[Function], Function]:
    """Make the decorated function, of tensors on the processor, an operation by this name.

    empty: what makes results like its own of the same arguments. changed: the arguments that are written to.
    meanwhile: the bytes that it takes besides, where they are many.
    """

    def register(function: Function) -> Function:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changed))
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", empty, lib=_LIBRARY)
        made = getattr(getattr(torch.ops, NAMESPACE), name).default
        if meanwhile is not None:
            MEANWHILE[made] = meanwhile
        return made

    return register
