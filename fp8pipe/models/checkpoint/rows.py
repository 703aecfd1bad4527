"""Tensors of a checkpoint in blocks of rows that stay in a processor's cache, several blocks at once.

A whole matrix in fp32, once for every step of arithmetic on it, costs more in fresh pages of memory than in arithmetic,
and memory that grows with the largest matrix. Blocks are read into memory rather than mapped, so that what is resident
is what is worked on, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

import torch
from torch import Tensor

from fp8pipe.models.checkpoint.tensors import TensorEntry
from fp8pipe.numerics.grids import same_bits

__all__ = ["each", "read_rows", "row_blocks", "same_values"]

_BLOCK_VALUES: Final = 1 << 18  # 1 MiB in fp32
_AHEAD: Final = 4  # blocks a worker may be ahead of who takes the results
T = TypeVar("T")
R = TypeVar("R")


def row_blocks(entry: TensorEntry) -> list[range]:
    """Rows of a tensor (its first axis; one of a scalar) in blocks of some 2^18 values; one empty block of none."""
    rows = entry.shape[0] if entry.shape else 1
    size = max(1, _BLOCK_VALUES // max(1, math.prod(entry.shape[1:])))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)] or [range(0)]


def read_rows(entry: TensorEntry, rows: range) -> Tensor:
    """Consecutive rows of a tensor, on the CPU: `(len(rows), *shape[1:])`, of a scalar `()`; see the entry's method."""
    return entry.read_rows(rows)


def same_values(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether dtype, shape and every bit of two tensors are the same; holds a block of each."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(each(lambda rows: same_bits(read_rows(a, rows), read_rows(b, rows)), row_blocks(a)))


def each(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """`work` of each item, in order, by as many threads as torch would use; few items are under way at once.

    An error of `work` is raised here, and ends the rest.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    with _undivided(threads) as pool:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > _AHEAD * threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


@contextmanager
def _undivided(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads do not divide an operation among further threads."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the initializer's count is that of threads to come, too
