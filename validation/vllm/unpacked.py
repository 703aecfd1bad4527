"""Weights of which two codes share a byte, as engines hold them once they are dequantized.

`layout` finds where each byte of a checkpoint goes. A layer that dequantizes its weight has a number in place of each
code, and calls it `weight`, also if the checkpoint calls the bytes `weight_packed`; its layout is that of the bytes
with every column twice.

Runs inside vLLM's Python: only torch is imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from validation.vllm.layout import Head, Layout, Origin, Piece

__all__ = ["unpacked", "weight_of"]

_PACKED: Final = "_packed"  # suffix of the name of the bytes, after that of the weight; ModelOpt's layout has none
_SCALES: Final = ("_global_scale", "_scale_2", "_scale")  # suffixes of its scales


def weight_of(name: str) -> str:
    """The name of the weight that a scale belongs to; any other name as it is."""
    return next((name.removesuffix(suffix) for suffix in _SCALES if name.endswith(suffix)), name)


def unpacked(layout: Layout) -> Layout:
    """The layout after the codes of weights in NVFP4 were unpacked; the given one is not changed.

    A weight that the engine divides between two columns keeps its packed form, and will be reported as missing.
    """
    known = {name: _twice(head) for name, head in layout.heads.items() if _is_packed(head)}
    origins = {}
    for name, origin in layout.origins.items():
        whole = bool(origin.pieces) and all(p.head.name in known and p.axis == 0 for p in origin.pieces)
        if whole:
            origins[name.removesuffix(_PACKED)] = _unpacked(origin, known)
        else:
            origins[name] = origin
    heads = [known.get(name, head) for name, head in layout.heads.items()]
    return replace(layout, heads={head.name: head for head in heads}, origins=origins)


def _is_packed(head: Head) -> bool:
    named = head.name.removesuffix(_PACKED).endswith(".weight")
    return named and head.dtype is torch.uint8 and len(head.shape) == 2


def _twice(head: Head) -> Head:
    rows, columns = head.shape
    return replace(head, name=head.name.removesuffix(_PACKED), shape=(rows, 2 * columns), dtype=torch.float32)


def _unpacked(origin: Origin, known: dict[str, Head]) -> Origin:
    pieces = [_piece(piece, known[piece.head.name]) for piece in origin.pieces]
    shape = (*origin.shape[:-1], 2 * origin.shape[-1])
    return replace(origin, shape=shape, pieces=pieces, unmarked=_doubled(origin.unmarked))


def _piece(piece: Piece, head: Head) -> Piece:
    columns: Any = 2 * _doubled(piece.columns)
    columns += torch.arange(columns.shape[1]) % 2
    return replace(piece, head=head, rows=_doubled(piece.rows), columns=columns)


def _doubled(matrix: Tensor) -> Tensor:
    """Every column twice; a single one stands for all of them."""
    return matrix.repeat_interleave(2, dim=1) if matrix.shape[1] > 1 else matrix.clone()
