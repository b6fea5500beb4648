"""How much memory a training step takes, found by rehearsing it on tensors that have shapes and types but no contents.

Forward, loss, backward and update are the run's own code under torch's FakeTensorMode, so that what autograd saves,
what autocast copies and what the optimiser keeps is counted as it really is, for any architecture and size, and none
of it is allocated. What a process needs beside its tensors, and whether that fits, is in `train/estimate.py`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import ThinkerConfig
from ..loss import balance_loss, cross_entropy_sum
from ..model import ThinkerLM
from .config import TrainConfig
from .decide import DTYPES, Precision
from .memory import checkpoint_activations
from .optim import build_optimizers

Part = Literal["weights", "gradients", "optimiser", "activations", "logits and loss", "workspace"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimiser", "activations", "logits and loss", "workspace")


class Ledger(TorchDispatchMode):
    """Adds up the bytes of the tensors alive, each under the part of the step that made it, and keeps the largest sum.

    Active like any mode of torch's; views of what is counted already count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: Part = "weights"
        self.alive: Counter[Part] = Counter()
        self.peak: Counter[Part] = Counter()
        # Each storage's entry is a list, because it may move to another part before it goes.
        self._entries: weakref.WeakKeyDictionary[torch.UntypedStorage, list[Part]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return made

    def move(self, tensor: Tensor, part: Part) -> None:
        """Count a tensor under another part from now on."""
        storage = tensor.untyped_storage()
        entry = self._entries[storage]
        self.alive[entry[0]] -= storage.nbytes()
        self.alive[part] += storage.nbytes()
        entry[0] = part

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage in self._entries:
            return
        entry, size = [self.part], storage.nbytes()
        self._entries[storage] = entry
        self.alive[entry[0]] += size
        weakref.finalize(storage, self._leave, entry, size)
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def _leave(self, entry: list[Part], size: int) -> None:
        self.alive[entry[0]] -= size


def rehearse(
    config: ThinkerConfig,
    settings: TrainConfig,
    precision: Precision,
    device: str = "cpu",
    *,
    length: int | None = None,
    packed: bool = False,
) -> dict[Part, int]:
    """Bytes of each part's tensors at the moment of an eager step when they are most. Nothing is allocated.

    length: of the rows, unless it is ctx_len. packed: rows of several conversations, which are masked.
    """
    ledger = Ledger()
    kind = torch.device(device).type
    with FakeTensorMode(), ledger:
        with torch.device(device):
            model = ThinkerLM(config)
        if settings.checkpoint_activations:
            checkpoint_activations(model)
        optimizers = build_optimizers(
            model,
            optimizer=settings.optimizer,
            lr=settings.lr,
            muon_lr=settings.muon_lr,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            muon_dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        )
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
        shape = settings.batch_size, length if length is not None else config.ctx_len
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        segments = torch.ones_like(tokens) if packed else None
        # The optimiser's state exists from the second step on, gradients during the forward from the second batch on.
        for micro_batches in (1, min(settings.accumulate, 2)):
            for _ in range(micro_batches):
                ledger.part = "activations"
                with torch.autocast(kind, DTYPES[precision], enabled=precision != "float32"):
                    # As NextTokenLoss has it, without its checks of values: there are none here.
                    hidden, routed = model.features(
                        embeddings=model.tok_emb(tokens), segments=segments, return_router=True
                    )
                    assert isinstance(hidden, Tensor)
                    ledger.part = "logits and loss"
                    total = cross_entropy_sum(hidden.flatten(0, 1), model.head.weight, tokens.flatten())
                    total = total + balance_loss(tuple(routed), segments, config.num_experts_per_tok).to(device)
                del hidden, routed
                ledger.part = "workspace"
                total.backward()
                del total
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            for optimizer in optimizers:
                optimizer.step()
                for state in optimizer.state.values():
                    for tensor in state.values():
                        ledger.move(tensor, "optimiser")
                optimizer.zero_grad(set_to_none=True)
    return {part: ledger.peak[part] for part in PARTS}
