"""Put an engine's values back into the checkpoint's order, by the places that `layout` has learned.

Runs inside vLLM's Python: torch alone.
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

_CHUNK = 1 << 22  # elements that are placed at a time


@dataclass(slots=True)
class Found:
    """A tensor of the checkpoint, as the engine holds it.

    Attributes:
        head: which.
        value: fp32, of the head's shape; NaN where the engine holds nothing of it.
        seen: bool, a matrix, which elements the engine holds.
        unequal: how many elements it holds in several places with different numbers.
        changed: whether its loader computes instead of rearranging.
        how: ways in which it was read.
    """

    head: Head
    value: Tensor
    seen: Tensor
    unequal: int = 0
    changed: bool = False
    how: set[str] = field(default_factory=set)

    @property
    def absent(self) -> int:
        """How many elements the engine does not hold."""
        return int((~self.seen).sum())

    def place(self, piece: Piece, part: Tensor) -> None:
        """Take over what one of the engine's tensors holds of it: fp32, a matrix."""
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
            if not once:  # one place may be there twice within this part
                self.unequal += int(_unequal(value[here], new).sum())


class Rebuild:
    """Collects what the engine's tensors hold, and gives each tensor of the checkpoint once it is whole."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.found: dict[str, Found] = {}
        self.waiting = Counter(piece.head.name for origin in layout.origins.values() for piece in origin.pieces)

    def add(self, name: str, value: Tensor, how: str) -> Iterator[Found]:
        """Take over one of the engine's tensors.

        Args:
            name: the engine's.
            value: fp32, in the shape in which it was loaded.
            how: it was read.

        Yields:
            what no other of its tensors holds a part of.
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
    """Places in the checkpoint's tensor, the numbers that belong there, and how many columns each place has."""
    rows, columns, width = piece.rows, piece.columns, piece.head.columns
    if rows.shape[0] == 1 and columns.shape[1] == 1:  # the engine holds it transposed
        rows, columns, part = rows.t(), columns.t(), part.t()
    whole_rows = rows.shape[1] == 1 and columns.shape[0] == 1 and part.shape[1] == width
    if whole_rows and torch.equal(columns.reshape(-1), torch.arange(width)):
        return rows.reshape(-1).expand(part.shape[0]), part, width
    return (rows * width + columns).expand(part.shape).reshape(-1), part.reshape(-1, 1), 1


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    return (one != other) & ~(one.isnan() & other.isnan())
