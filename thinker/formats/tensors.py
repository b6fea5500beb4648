"""Thinker's own tensors as files see them: their names and shapes, and how they are cut out of or into foreign ones.

A `Layout` says for each Thinker tensor which pieces of foreign tensors make it up; the same layout serves both
directions. The tables of foreign names live in `huggingface.py` and `gguf.py`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..checkpoint.files import brief
from ..checkpoint.reader import all_finite, widen
from ..config import ThinkerConfig
from .q8 import Q8Tensor

Array = np.ndarray | Q8Tensor
T = TypeVar("T", bound=Array)
Index = slice | int | types.EllipsisType | tuple[Any, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One foreign tensor's part in one of ours: `ours[at] = foreign[within]`."""

    name: str
    shape: Shape
    at: Index = ...
    within: Index = ...


@dataclass(frozen=True)
class Recipe:
    """One Thinker tensor: its shape and the pieces that fill it completely."""

    shape: Shape
    pieces: tuple[Piece, ...]

    def assemble(self, read: Callable[[str], Array]) -> Array:
        """Our tensor from foreign ones; a single whole piece is passed on without a copy."""
        if len(self.pieces) == 1 and self.pieces[0].at is ... and self.pieces[0].within is ...:
            return read(self.pieces[0].name)
        parts = [read(piece.name)[piece.within] for piece in self.pieces]
        quantised = [part for part in parts if isinstance(part, Q8Tensor)]
        if len(quantised) == len(parts):
            columns = self.shape[-1] // quantised[0].quants.shape[-1] * quantised[0].scales.shape[-1]
            return Q8Tensor(
                self._join([part.quants for part in quantised], self.shape),
                self._join([part.scales for part in quantised], (*self.shape[:-1], columns)),
            )
        return self._join([np.asarray(part) for part in parts], self.shape)

    def _join(self, parts: list[np.ndarray], shape: Shape) -> np.ndarray:
        kinds = {part.dtype for part in parts}
        joined = np.empty(shape, kinds.pop() if len(kinds) == 1 else np.float32)
        for piece, part in zip(self.pieces, parts, strict=True):
            joined[piece.at] = part if part.dtype == joined.dtype else widen(part)
        return joined


Layout = dict[str, Recipe]


def build_layout(config: ThinkerConfig, names: Mapping[str, str]) -> Layout:
    """The layout that a table of names describes.

    `names` maps each Thinker name, without `blocks.{i}.`, to a foreign one, in which {i} is the layer and {e} the
    expert. Stacked experts are cut along their first axis where the foreign name has {e}, and qkv into three.
    """
    recipes: Layout = {}
    for ours, shape in parameter_shapes(config).items():
        i, part = ours.removeprefix("blocks.").split(".", 1) if ours.startswith("blocks.") else ("", ours)
        if part == "attn.qkv.weight":
            rows = shape[0] // 3
            thirds = {third: slice(n * rows, (n + 1) * rows) for n, third in enumerate("qkv")}
            pieces = tuple(
                Piece(names[f"attn.{third}.weight"].format(i=i), (rows, *shape[1:]), at) for third, at in thirds.items()
            )
        elif "{e}" in names[part]:
            pieces = tuple(Piece(names[part].format(i=i, e=e), shape[1:], at=e) for e in range(shape[0]))
        else:
            pieces = (Piece(names[part].format(i=i), shape),)
        recipes[ours] = Recipe(shape, pieces)
    return recipes


class LazyTensors(Mapping[str, T], Generic[T]):
    """Tensors that are made when they are asked for, each time anew, and checked for NaN and infinity then."""

    def __init__(self, makers: Mapping[str, Callable[[], T]], where: str) -> None:
        self._makers = makers
        self._where = where

    def __getitem__(self, name: str) -> T:
        array = self._makers[name]()
        if not all_finite(array.scales if isinstance(array, Q8Tensor) else array):
            raise ValueError(f"{self._where}: {name} holds NaN or infinity; its training diverged, or it is damaged")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def parameter_shapes(config: ThinkerConfig) -> dict[str, Shape]:
    """Every parameter of `ThinkerLM` with this architecture, by name."""
    wide, hidden, width = config.d_model, config.d_ff, config.head_width
    inner, kv_inner = config.n_heads * width, config.n_kv_heads * width
    shapes: dict[str, Shape] = {"tok_emb.weight": (config.vocab_size, wide)}
    for i in range(config.n_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.scale"] = (wide,)
        if config.use_gqa:
            shapes[f"{block}.attn.q.weight"] = (inner, wide)
            shapes[f"{block}.attn.k.weight"] = (kv_inner, wide)
            shapes[f"{block}.attn.v.weight"] = (kv_inner, wide)
        else:
            shapes[f"{block}.attn.qkv.weight"] = (3 * inner, wide)
        if config.use_qk_norm:
            shapes[f"{block}.attn.q_norm.scale"] = (width,)
            shapes[f"{block}.attn.k_norm.scale"] = (width,)
        shapes[f"{block}.attn.out_proj.weight"] = (wide, inner)
        shapes[f"{block}.norm2.scale"] = (wide,)
        if config.use_moe:
            shapes[f"{block}.moe.router.weight"] = (config.num_experts, wide)
            shapes[f"{block}.moe.experts.gate_proj"] = (config.num_experts, hidden, wide)
            shapes[f"{block}.moe.experts.up_proj"] = (config.num_experts, hidden, wide)
            shapes[f"{block}.moe.experts.down_proj"] = (config.num_experts, wide, hidden)
        else:
            if config.use_swiglu:
                shapes[f"{block}.mlp.gate_proj.weight"] = (hidden, wide)
            shapes[f"{block}.mlp.up_proj.weight"] = (hidden, wide)
            shapes[f"{block}.mlp.down_proj.weight"] = (wide, hidden)
        if config.layer_scale is not None:
            shapes[f"{block}.scale1"] = (wide,)
            shapes[f"{block}.scale2"] = (wide,)
    shapes["norm.scale"] = (wide,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, wide)
    return shapes


def foreign_shapes(layout: Layout) -> dict[str, Shape]:
    """Every foreign tensor of a layout with its shape."""
    return {piece.name: piece.shape for recipe in layout.values() for piece in recipe.pieces}


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raise `ValueError` when tensors are missing, unexpected, or of another shape than the configuration says."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        kinds = {"missing": missing, "unexpected": unexpected}
        problems = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
        raise ValueError(f"{where}: the tensors are not those of its configuration: {'; '.join(problems)}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, its configuration says {list(shape)}")


def to_ours(layout: Layout, read: Callable[[str], Array], where: str) -> LazyTensors[Array]:
    """Thinker's tensors over foreign ones."""
    return LazyTensors({name: _assembler(recipe, read) for name, recipe in layout.items()}, where)


def to_foreign(layout: Layout, tensors: Mapping[str, T], where: str) -> LazyTensors[T]:
    """Foreign tensors over Thinker's, for layouts whose every piece is a whole foreign tensor."""
    makers: dict[str, Callable[[], T]] = {}
    for name, recipe in layout.items():
        for piece in recipe.pieces:
            assert piece.within is ..., f"{piece.name} is made up of several tensors"
            makers[piece.name] = _cutter(tensors, name, piece)
    return LazyTensors(makers, where)


def _assembler(recipe: Recipe, read: Callable[[str], Array]) -> Callable[[], Array]:
    return lambda: recipe.assemble(read)


def _cutter(tensors: Mapping[str, T], name: str, piece: Piece) -> Callable[[], Any]:
    return lambda: tensors[name][piece.at]


def _some(names: list[str]) -> str:
    """A few names and how many more there are: a message stays one line."""
    shown = ", ".join(brief(name, 80) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
