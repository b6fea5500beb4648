"""A rehearsal of training: the true steps on tensors without values, for the memory that they ask for.

Whatever a step holds is also asked of the system's own allocator, in the true order and among the true small objects,
but never touched, so that it takes no memory; the allocator then tells how much it needed of the system, holes and all.
What a process needs besides is measured in `estimate.py`.
"""

# B rows at once, T ctx_len, V vocabulary

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .. import attention
from ..fused import kernels
from ..fused.operations import MEANWHILE, NAMESPACE
from .allocator import Heap
from .decide import Precision, probe, worth_probing
from .loop import take_step
from .run import Run

aten = torch.ops.aten

STEPS = 3  # the optimiser's state comes with the first, and the heap has settled with the third
WEIGHTS, GRADIENTS, OPTIMISER, ACTIVATIONS, LOGITS = PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "logits and loss",
)

# What the compiler computes together with what comes before or after it, besides everything pointwise.
FUSED = {
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten._to_copy.default,
    aten.bernoulli_.float,
    aten.cat.default,
    aten.clone.default,
    aten.empty_like.default,
    aten.logsumexp.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    # In its place the compiler has the plain form.
    torch.ops.thinker.norm.default,
    torch.ops.thinker.norm_backward.default,
}

PRODUCTS = {aten.mm.default, aten.bmm.default, aten._grouped_mm.default}

# Kernels that work on a copy of their first argument, which no dispatcher sees.
WITH_A_COPY = {aten.logsumexp.default}


@dataclass(frozen=True)
class Rehearsal:
    """Bytes by part, and how many programs for products oneDNN would keep."""

    whole: dict[str, int]  # the most there ever is of each
    at_peak: dict[str, int]  # when most is in use
    held: int  # at most by the heap, holes included; 0 where the allocator is not known
    rest: int  # in use between two steps; the heap keeps its holes, and what comes then fills them
    products: int  # shapes of products
    grouped: int  # shapes of grouped products, of whose groups each has its own size, in every layer and step anew

    @property
    def peak(self) -> int:
        """What the tensors take at most, with the heap's holes."""
        return max(sum(self.at_peak.values()), self.held)


class Ledger(TorchDispatchMode):
    """Counts the storages that live, and has the heap set memory aside for each. Only for tensors without values."""

    def __init__(self, heap: Heap) -> None:
        super().__init__()
        self.compiled = False
        self.products: set[Any] = set()
        self.grouped: set[Any] = set()
        self.heap = heap
        self.kinds: dict[int, str] = {}  # by the storage's number
        self.numbers: dict[int, int] = {}  # by the storage's address
        self.events: list[tuple[int, int]] = []  # number of the storage, and its bytes, negative when they are freed
        self.kind = ACTIVATIONS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:  # a value is asked for: any will do
            return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            return args[0].new_empty(0)  # only checks do this: none was wrong
        if func.namespace not in ("aten", NAMESPACE) or func.is_view or func is aten._unsafe_view.default:
            return func(*args, **(kwargs or {}))
        self._count_product(func, args)
        in_loops = self.compiled and self.kind in (ACTIVATIONS, LOGITS)
        fused = in_loops and (torch.Tag.pointwise in func.tags or func in FUSED)
        if in_loops and not fused:
            self._note_all((args, kwargs))  # what was fused so far is needed whole now
        if not in_loops and func in WITH_A_COPY:
            self.note(args[0].new_empty(args[0].shape))
        result = _grouped_mm(*args[:3]) if func is aten._grouped_mm.default else func(*args, **(kwargs or {}))
        if not fused:
            self._note_all(result)
        if func in MEANWHILE:
            self.note(args[0].new_empty(MEANWHILE[func](*args), dtype=torch.uint8))
        return result

    def _note_all(self, values: Any) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor):
                self.note(value)

    def _count_product(self, func: Any, args: Any) -> None:
        """oneDNN keeps a program for every shape of a product in a narrow type, whose factors torch copies where they
        are neither whole nor whole when turned."""
        if func not in PRODUCTS or args[0].dtype not in (torch.bfloat16, torch.float16):
            return
        if func is aten._grouped_mm.default:
            self.grouped.add(tuple((x.shape, x.stride()) for x in args[:2]))
        else:
            self.products.add((func, *((x.shape, x.is_contiguous(), x.mT.is_contiguous()) for x in args[:2])))

    def note(self, tensor: Tensor) -> None:
        """Enter a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if size == 0 or address in self.numbers:
            return
        number = len(self.kinds)
        self.numbers[address] = number
        self.kinds[number] = self.kind
        self.events.append((number, size))
        place = self.heap.take(size)
        weakref.finalize(storage, self._freed, address, number, size, place)

    def _freed(self, address: int, number: int, size: int, place: int | None) -> None:
        if self.numbers.get(address) == number:
            del self.numbers[address]
        self.events.append((number, -size))
        self.heap.give_back(place, size)

    @property
    def in_use(self) -> int:
        """Bytes that live now."""
        return sum(size for _, size in self.events)

    def call(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is."""
        self.note(tensor)
        self.kinds[self.numbers[tensor.untyped_storage()._cdata]] = kind

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when most were in use."""
        now = most = when = 0
        for index, (_, size) in enumerate(self.events):
            now += size
            if now > most:
                most, when = now, index
        return self._sums(self.events[: when + 1])

    def largest(self) -> dict[str, int]:
        """The most bytes that each kind ever had."""
        now: dict[str, int] = {}
        most: dict[str, int] = {}
        for number, size in self.events:
            kind = self.kinds[number]
            now[kind] = now.get(kind, 0) + size
            most[kind] = max(most.get(kind, 0), now[kind])
        return most

    def _sums(self, events: list[tuple[int, int]]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for number, size in events:
            sums[self.kinds[number]] = sums.get(self.kinds[number], 0) + size
        return sums


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """A grouped product's shape, which torch tells of tensors without values in bfloat16 alone. The groups are the
    first dimension of the factor that has three, or cut the inner dimension of two factors that have two."""
    groups = () if a.dim() != b.dim() else (len(ends),)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


def rehearse(make: Callable[[], Run], steps: int = STEPS, accelerator: bool = False) -> Rehearsal:
    """Build a run and do with it, on tensors that have shapes but no values, what `train/` does with a true one.

    That is to probe the processor with one row, to take a few steps, and to look at held-out text. `make` is called
    where every tensor that is made is one without values. Nothing is read from the run's folder, nor written to it. On
    an accelerator attention is one kernel, and the heap another's.
    """
    heap, precisions = Heap(known=not accelerator), worth_probing()  # which takes true tensors
    with heap.in_small_pages(), _forms_of(accelerator), FakeTensorMode(allow_non_fake_inputs=True):
        ledger = Ledger(heap)
        with ledger:
            run = make()
            ledger.compiled = run.decisions.compile
            _name_parts(run, ledger)
            _probe(run, precisions)
            ledger.grouped.clear()
            for _ in range(steps):
                take_step(run, run.module, 1.0)
                ledger.kind = OPTIMISER
                run.count(0, 0.0)
                ledger.kind = ACTIVATIONS
            rest = ledger.in_use
            with run.shown():
                _look(run)
            del run
    return Rehearsal(ledger.largest(), ledger.at_peak(), heap.most, rest, len(ledger.products), len(ledger.grouped))


@contextmanager
def _forms_of(accelerator: bool) -> Iterator[None]:
    """Inside the block, for an accelerator, nothing is chosen that is there for processors alone."""
    before = attention.trains_on_processor, kernels.is_available
    if accelerator:
        attention.trains_on_processor, kernels.is_available = (lambda q: False), (lambda dtype: False)
    try:
        yield
    finally:
        attention.trains_on_processor, kernels.is_available = before


def _name_parts(run: Run, ledger: Ledger) -> None:
    """Let the ledger know what begins to live in which part of the step."""
    for tensor in (*run.model.parameters(), *run.model.buffers()):
        ledger.call(tensor, WEIGHTS)

    def enter(kind: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            ledger.kind = kind

        return hook

    def gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.call(parameter.grad, GRADIENTS)

    run.model.norm.register_forward_hook(enter(LOGITS))
    run.module.register_forward_hook(enter(ACTIVATIONS))
    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(gradient)
    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(enter(OPTIMISER))
        optimizer.register_step_post_hook(enter(ACTIVATIONS))


def _probe(run: Run, precisions: tuple[Precision, ...]) -> None:
    """What deciding on a precision takes, and the programs that it leaves behind."""
    one_row = tuple(torch.from_numpy(part[:1]) for part in run.batches.batch(0))
    for name in precisions if run.settings.precision == "auto" else (run.decisions.precision,):
        probe(run.module, one_row, "cpu", name)


@torch.no_grad()
def _look(run: Run) -> None:
    """What looking at held-out text takes, in the parameters' own precision, as at the end of a run."""
    run.model.eval()
    run.module(*(torch.from_numpy(rows[: run.settings.batch_size]) for rows in run.batches.batch(0)))
