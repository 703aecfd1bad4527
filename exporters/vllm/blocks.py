"""Processes a plan's units in blocks of rows; linting, writing and comparing share this loop.

A weight with one scale per row can be split between any two rows, and one with a scale per block of 128 x 128 between
any two rows of blocks. A weight stored as `(in, out)` has its outputs along the other axis, so it is processed as one
piece; only GPT-2 and similar models are stored that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

from torch import Tensor

from exporters.vllm.plan import Unit
from fp8pipe.models.checkpoint.rows import each, read_rows, row_blocks
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor

__all__ = ["block_rows", "blocks_of", "by_unit", "scale_of"]

R = TypeVar("R")


def blocks_of(unit: Unit) -> list[range]:
    """Split a unit's weight into ranges of rows that are processed one at a time; one range if it is transposed."""
    if unit.transposed and unit.entry.shape:
        return [range(unit.entry.shape[0])]
    return row_blocks(unit.entry, 1 if unit.block is None else unit.block[0])


def by_unit(units: Iterable[Unit], work: Callable[[Unit, range], R]) -> Iterator[tuple[Unit, list[R]]]:
    """Apply `work` to every block of the units, in threads (see `each`).

    Yields:
        Each unit with the results of its blocks, in order.
    """
    units = list(units)
    pieces = ((unit, rows) for unit in units for rows in blocks_of(unit))
    with closing(each(lambda piece: work(*piece), pieces)) as results:
        for unit in units:
            yield unit, [next(results) for _ in blocks_of(unit)]


def scale_of(scale: TensorEntry, unit: Unit, rows: range) -> Tensor:
    """The part of a unit's scale, as stored in the source or the export, that belongs to a block of rows."""
    if len(scale.shape) != 2 or unit.transposed:
        return read_tensor(scale)
    return read_rows(scale, rows if unit.block is None else block_rows(rows, unit.block))


def block_rows(rows: range, block: tuple[int, int]) -> range:
    """The rows of blocks that some rows of a weight belong to; `rows` starts with a block."""
    return range(rows.start // block[0], -(-rows.stop // block[0]))
