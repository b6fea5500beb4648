"""The optimisers: Muon for the hidden matrices, AdamW for the rest, and the schedules of their rates and of β2.

Which hyperparameters a run uses is decided in `train/config.py` and `train/recipes.py`; when a step is taken, in
`train/loop.py`; how many rows it has, in `data/batches.py`.
"""

# M matrices of one shape, R rows, C columns, V vocabulary

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.training import MEAN

Schedule = Literal["linear", "cosine", "wsd", "constant"]

COSINE_END = 0.1  # of the peak, as nanoGPT has it
OF_TOKENS = ("tok_emb.weight", "head.weight")  # a row a token; one parameter when they are tied

# Four steps of the Polar Express (arXiv 2505.16932): the odd polynomials a x + b x³ + c x⁵ that together bring all
# values between 0.0045 and 1 closest to 1, here to within 0.13. All but the last are stretched by 1 % for rounding.
POLAR_EXPRESS = (
    (8.104424211900605, -22.620775305412213, 16.258644320346637),
    (3.917172988616803, -2.8251058030087606, 0.5246723857940992),
    (3.3117236322879706, -2.4343889067896782, 0.4874137299482929),
    (2.324057323014973, -1.6898264502235854, 0.4210712535903383),
)
TINY = 1e-12  # so that a matrix of zeros stays one


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Roughly the nearest orthogonal matrix to each of (M, R, C), in dtype: singular values become about 1.

    They are first divided by the eighth root of the sum of their eighth powers, so near to the largest that four steps
    do what takes five after the norm of the matrix itself. The products for it are the first step's: it costs nothing.
    """
    R, C = matrices.shape[-2:]
    x = (matrices.mT if R > C else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    gram = x @ x.mT
    square = gram @ gram
    bound = square.norm(dim=(-2, -1), keepdim=True).sqrt() + TINY  # of the Gram matrix
    x, gram, square = x / bound.sqrt(), gram / bound, square / bound**2
    (a, b, c), *later = POLAR_EXPRESS
    polynomial = b * gram + c * square
    if dtype == torch.float32 and R != C:
        # The polynomials' product is found on Gram matrices, which are smaller; sixteen bits are too few for that.
        identity = torch.eye(min(R, C), dtype=dtype, device=x.device)
        polynomial = product = polynomial + a * identity
        for a, b, c in later:
            gram = polynomial @ gram @ polynomial
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
            product = polynomial @ product
        x = product @ x
    else:
        # Sums inside the products: a fifth faster, and rounded once instead of three times.
        x = torch.baddbmm(x, polynomial, x, beta=a)
        for a, b, c in later:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if R > C else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., kellerjordan.github.io/posts/muon), for matrices.

    Matrices of equal shape are orthogonalised in one batch. A parameter (E, R, C) counts as E matrices; one with
    `parts` in its group, (parts * R, C), as that many.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov's look ahead
                matrices = update.view(-1, parameter.shape[-2] // group["parts"], parameter.shape[-1])
                by_shape[matrices.shape[-2], matrices.shape[-1]].append((parameter, matrices, group))
        for (rows, columns), entries in by_shape.items():
            updates = orthogonalise(torch.cat([matrices for _, matrices, _ in entries]), self.dtype)
            shares = updates.split([len(matrices) for _, matrices, _ in entries])
            for (parameter, _, group), update in zip(entries, shares, strict=True):
                lr = group["lr"]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-lr * _stretch(rows, columns))


def _stretch(rows: int, columns: int) -> float:
    """A tall update moves each output as much as a square one does."""
    return math.sqrt(max(1.0, rows / columns))


class Inheritance:
    """How the row of a token in a matrix (V, C) is made of rows that tokens have of their own: I @ own.

    A token's row is its own and `share` of the rows of the two that it was merged from, which are made in the same way:
    `parts` (V, 2), or -1 for what wasn't merged.
    """

    def __init__(self, parts: np.ndarray, share: float, device: str | torch.device = "cpu") -> None:
        made_of: dict[int, dict[int, float]] = {}

        def row(token: int) -> dict[int, float]:
            if token not in made_of:
                weights = {token: 1.0}
                for part in parts[token].tolist():
                    for owner, weight in row(part).items() if part >= 0 else ():
                        weights[owner] = weights.get(owner, 0.0) + share * weight
                made_of[token] = weights
            return made_of[token]

        entries = [(heir, owner, weight) for heir in range(len(parts)) for owner, weight in row(heir).items()]
        heirs, owners, weights = (torch.tensor(column, device=device) for column in zip(*entries, strict=True))
        numbers = torch.arange(len(parts), device=device)
        by_owner = owners.argsort(stable=True)
        self._spread = owners, torch.searchsorted(heirs, numbers), weights
        self._gather = heirs[by_owner], torch.searchsorted(owners[by_owner], numbers), weights[by_owner]

    def spread(self, own: Tensor) -> Tensor:
        """I @ own."""
        return _weighted_rows(own, *self._spread)

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradient for `own` from the one for I @ own: I.T @ gradient."""
        return _weighted_rows(gradient, *self._gather)


def _weighted_rows(matrix: Tensor, which: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(which, matrix, starts, mode="sum", per_sample_weights=weights.to(matrix.dtype))


class AdamW(torch.optim.AdamW):
    """torch's, fused. What a group with an `inheritance` trains, and lets decay, is what its tokens have of their own.

    That needn't be kept: when it changes by d, the matrix changes by I @ d.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=1e-10, fused=True)
        # Otherwise the fused kernel would be the one to skip a step whose scaled gradients overflowed.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        heirs: list[tuple[Tensor, Tensor, Inheritance]] = []
        for group in self.param_groups:
            inheritance: Inheritance | None = group.get("inheritance")
            for parameter in group["params"]:
                if inheritance is not None and parameter.grad is not None:
                    parameter.grad = inheritance.gather(parameter.grad)
                    heirs.append((parameter, parameter * (1 - group["lr"] * group["weight_decay"]), inheritance))
        super().step()
        for parameter, decayed, inheritance in heirs:
            parameter.copy_(decayed + inheritance.spread(parameter - decayed))


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What Muon trains: the matrices inside blocks, also an encoder's, but the router, a head of its own kind."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".blocks." in f".{name}" and parameter.dim() >= 2 and ".router." not in name
    }


def build_optimizers(
    model: nn.Module,
    *,
    optimizer: Literal["muon", "adamw"],
    lr: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    muon_dtype: torch.dtype,
    inheritance: Inheritance | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices and AdamW on the rest, or AdamW alone.

    Vectors never decay. All matrices, the embedding too, decay by the same share a step: `weight_decay` times the rate
    of the hidden ones. `inheritance` is that of the embedding and the head.
    """
    hidden = hidden_matrices(model)
    rest = {name: p for name, p in model.named_parameters() if name not in hidden}
    vectors = [p for p in rest.values() if p.dim() < 2]
    heirs = () if inheritance is None else OF_TOKENS
    matrices = [p for name, p in rest.items() if p.dim() >= 2 and name not in heirs]
    built: list[torch.optim.Optimizer] = []
    pace = muon_lr / lr if optimizer == "muon" else 1.0
    groups: list[dict[str, Any]] = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": weight_decay * pace},
    ]
    if heirs:
        of_tokens = [rest[name] for name in heirs if name in rest]
        groups.append({"params": of_tokens, "weight_decay": weight_decay * pace, "inheritance": inheritance})
    if optimizer == "muon":
        fused = [p for name, p in hidden.items() if name.endswith("qkv.weight")]
        single = [p for name, p in hidden.items() if not name.endswith("qkv.weight")]
        muon_groups = [{"params": params, "parts": parts} for params, parts in ((single, 1), (fused, 3)) if params]
        built.append(Muon(muon_groups, lr=muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
    else:
        groups.append({"params": list(hidden.values()), "weight_decay": weight_decay})
    built.append(AdamW(groups, lr=lr, betas=betas))
    for group in (group for built_one in built for group in built_one.param_groups):
        group["peak_lr"] = group["lr"]
    return built


def rate(progress: float, *, schedule: Schedule, warmup: float, cooldown: float = 0.2) -> float:
    """The share of the peak learning rate at `progress` (0 to 1) of the run; warm-up takes its first `warmup` share.

    - linear: falls to zero from the end of the warm-up on (arXiv 2502.15938).
    - cosine: half a wave down to a tenth (arXiv 1608.03983, without restarts).
    - wsd: warm-up, stable, decay (arXiv 2404.06395): stays at the peak until the last `cooldown` share of the run, in
      which it falls to zero as 1 - sqrt of that share's progress (arXiv 2405.18392).
    - constant: stays.
    """
    if progress < warmup:
        return progress / warmup
    after = min(1.0, (progress - warmup) / (1 - warmup))
    match schedule:
        case "linear":
            return 1 - after
        case "cosine":
            return COSINE_END + (1 - COSINE_END) / 2 * (1 + math.cos(math.pi * after))
        case "wsd":
            begun = progress - (1 - cooldown)
            return 1.0 if begun <= 0 else 1 - math.sqrt(min(1.0, begun / cooldown))
        case "constant":
            return 1.0


def beta2_in_tokens(tokens: int, half_life: float) -> float:
    """Adam's β2 for a step of so many tokens, if a gradient's weight shall halve in `half_life` tokens.

    Small batches need a β2 nearer to 1, or Adam forgets within a few of them (arXiv 2507.07101).
    """
    return 0.5 ** (tokens / half_life)


def set_beta2(optimizers: Iterable[torch.optim.Optimizer], beta2: float) -> None:
    """Set Adam's β2 for the next step; Muon has none."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (group["betas"][0], beta2)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


@torch.no_grad()
def follow(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Move the mean of each parameter's late values by this share to what the parameter is now.

    Means over the end of a run lie where the loss is flat and generalise better ("Averaging Weights Leads to Wider
    Optima and Better Generalization", arXiv 1803.05407). They are kept beside what an optimiser remembers.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if MEAN in state:
                state[MEAN].lerp_(parameter, share)
            else:
                state[MEAN] = parameter.detach().clone()


@contextmanager
def means_in_place(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside the block parameters have the values of their means, as far as they have any."""
    _exchange(optimizers)
    try:
        yield
    finally:
        _exchange(optimizers)


@torch.no_grad()
def _exchange(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if MEAN in state:
                value = parameter.clone()
                parameter.copy_(state[MEAN])
                state[MEAN].copy_(value)


def optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state under the parameters' names: `blocks.0.attn.qkv.weight/momentum` and so on."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizers(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises `ValueError` when it belongs to another model or optimiser."""
    parameters = dict(model.named_parameters())
    owner = {parameter: built for built in optimizers for group in built.param_groups for parameter in group["params"]}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise ValueError(f"the optimiser's state names {name!r}, which this model lacks")
        parameter = parameters[name]
        owner[parameter].state[parameter][key] = tensor.to(parameter.device) if tensor.dim() else tensor
