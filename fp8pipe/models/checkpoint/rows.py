"""Processes a checkpoint's tensors in blocks of rows that fit into a CPU cache, several blocks in parallel.

Processing whole matrices in fp32, one operation after another, spends more time on allocating memory pages than on
arithmetic, and needs memory in proportion to the largest matrix. Blocks are read from the file, not memory-mapped, so
that only the blocks in progress are resident in memory, whatever the size of the model.
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

from fp8pipe.models.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorEntry
from fp8pipe.numerics.grids import same_bits

__all__ = ["each", "read_rows", "row_blocks", "same_values"]

_BLOCK_VALUES: Final = 1 << 18  # 1 MiB in fp32
_AHEAD: Final = 4  # blocks that the workers may be ahead of the consumer
T = TypeVar("T")
R = TypeVar("R")


def row_blocks(entry: TensorEntry, multiple: int = 1) -> list[range]:
    """Divide a tensor into ranges of rows (indices along the first axis) of about 2^18 values each.

    All ranges but the last have a multiple of `multiple` rows. A scalar counts as one row. For an empty tensor, the
    result is a single empty range; for one that cannot be read by rows, it is a range of all.
    """
    rows = entry.shape[0] if entry.shape else 1
    if not entry.by_rows:
        return [range(rows)]
    size = max(1, _BLOCK_VALUES // max(1, math.prod(entry.shape[1:])) // multiple) * multiple
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)] or [range(0)]


def read_rows(entry: TensorEntry, rows: range) -> Tensor:
    """Consecutive rows of a tensor, on the CPU: `(len(rows), *shape[1:])`, or `()` for a scalar."""
    return entry.read_rows(rows)


def same_values(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors have the same shape and values; only a few blocks of each are in memory at a time.

    Two dtypes of unquantized floats are compared in one that holds both exactly; other dtypes must be equal. -0 differs
    from 0, and a NaN equals the same NaN.
    """
    if a.shape != b.shape or (a.dtype != b.dtype and not {a.dtype, b.dtype} <= PLAIN_FLOATS):
        return False
    wider = torch.promote_types(DTYPES[a.dtype], DTYPES[b.dtype])
    return all(each(lambda rows: same_bits(read_rows(a, rows).to(wider), read_rows(b, rows).to(wider)), row_blocks(a)))


def each(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Apply `work` to each item, on as many threads as torch is set to use, and yield the results in order.

    Only about four items per thread are submitted ahead of the consumer. An exception in `work` is raised here, and the
    items not yet started are skipped.
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
    """A thread pool whose threads run each torch operation on a single thread."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the initializer changed the default for later threads, too
