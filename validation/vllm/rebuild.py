"""Rearranges the values in an engine into the checkpoint's layout, using the positions determined by `layout`.

Runs inside vLLM's Python: only torch is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from validation.vllm.layout import Head, Layout, Piece

__all__ = ["Found", "Rebuild"]

_CHUNK = 1 << 22  # elements copied at a time


@dataclass(slots=True)
class Found:
    """A checkpoint tensor, rebuilt from the engine.

    Attributes:
        head: name, shape and dtype of the tensor.
        value: fp32, in the tensor's shape; NaN for elements that the engine does not have.
        seen: bool matrix, the elements that the engine has.
        unequal: number of elements that occur more than once in the engine, with different values.
        changed: whether the loader computes the values instead of rearranging them.
        how: the ways in which its parts were read.
    """

    head: Head
    value: Tensor
    seen: Tensor
    unequal: int = 0
    changed: bool = False
    how: set[str] = field(default_factory=set)

    @property
    def absent(self) -> int:
        """Number of elements that the engine does not have."""
        return int((~self.seen).sum())

    def place(self, piece: Piece, part: Tensor) -> None:
        """Copy the elements of one piece of an engine tensor into `value`; `part` has their values, an fp32 matrix."""
        index, part, width = _index(piece, part)
        value, seen = self.value.view(-1, width), self.seen.view(-1, width)
        whole_rows = width == self.head.columns
        once = whole_rows and index.unique().numel() == index.numel()
        step = max(1, _CHUNK // width)
        for start in range(0, index.numel(), step):
            here, new = index[start : start + step], part[start : start + step]
            again = seen[here]
            if bool(again.any()):
                self.unequal += int((_unequal(value[here], new) & again).sum())
            value[here], seen[here] = new, True
            if not once:  # an element may occur twice within this part
                self.unequal += int(_unequal(value[here], new).sum())


class Rebuild:
    """Collects the values of engine tensors, and returns each checkpoint tensor when all its parts have been added."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.found: dict[str, Found] = {}
        self.waiting = Counter(piece.head.name for origin in layout.origins.values() for piece in origin.pieces)

    def add(self, name: str, value: Tensor, how: str) -> Iterator[Found]:
        """Add one of the engine's tensors.

        Args:
            name: name in the engine.
            value: fp32, in the tensor's shape during loading.
            how: how it was read.

        Yields:
            The checkpoint tensors that are now complete.
        """
        origin = self.layout.origins[name]
        matrix = value.reshape(-1, origin.shape[-1] if len(origin.shape) > 1 else 1)
        for piece in origin.pieces:
            head = piece.head
            found = self.found.get(head.name)
            if found is None:
                nothing = torch.full(head.shape, torch.nan, dtype=torch.float32)
                found = Found(head, nothing, torch.zeros(head.rows, head.columns, dtype=torch.bool))
                self.found[head.name] = found
            found.how.add(how)
            found.changed |= piece.changed
            if not piece.changed:
                found.place(piece, piece.of(matrix))
            self.waiting[head.name] -= 1
            if not self.waiting[head.name]:
                yield self.found.pop(head.name)


def _index(piece: Piece, part: Tensor) -> tuple[Tensor, Tensor, int]:
    """Indices of rows of the checkpoint tensor viewed as `(-1, width)`, the values of these rows, and `width`.

    `width` is the number of columns if the piece consists of whole rows, else 1, so that rows are single elements.
    """
    rows, columns, width = piece.rows, piece.columns, piece.head.columns
    if rows.shape[0] == 1 and columns.shape[1] == 1:  # transposed in the engine
        rows, columns, part = rows.t(), columns.t(), part.t()
    whole_rows = rows.shape[1] == 1 and columns.shape[0] == 1 and part.shape[1] == width
    if whole_rows and torch.equal(columns.reshape(-1), torch.arange(width)):
        return rows.reshape(-1).expand(part.shape[0]), part, width
    return (rows * width + columns).expand(part.shape).reshape(-1), part.reshape(-1, 1), 1


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    return (one != other) & ~(one.isnan() & other.isnan())
