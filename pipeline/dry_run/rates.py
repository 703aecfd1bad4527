"""Measures how fast this machine multiplies matrices and moves memory, in about a second.

The cost model of GPUs takes these two rates from data sheets (`pipeline.dry_run.devices`). For a CPU no data sheet
states what torch achieves, so both are measured: with the dtype and about the shapes of the planned run, because small
products are slower, and under the machine's current load.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from pipeline.dry_run.costs import Product

_BUDGET: Final = 0.3  # seconds for each rate
_LEAST: Final = 3  # runs
_LARGEST: Final = 1 << 24  # values of a measured matrix
_COPIED: Final = 1 << 26  # bytes, more than caches hold


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates: FLOP/s of matrix products, bytes/s that are read and written."""

    products: float
    memory: float

    def seconds(self, product: Product, itemsize: int) -> float:
        """Time of a product: of its arithmetic, or of reading and writing its matrices, whichever is longer."""
        values = product.inner * (product.rows + product.cols) + product.rows * product.cols
        arithmetic = product.operations / self.products
        return max(arithmetic, product.times * values * itemsize / self.memory)


def measure_rates(rows: int, inner: int, cols: int, dtype: torch.dtype) -> Rates:
    """Measure this machine with a product `(rows, inner) x (inner, cols)`, reduced if it is very large, and a copy."""
    rows, inner = min(rows, _LARGEST // inner or 1), min(inner, 1 << 13)
    cols = min(cols, max(1, _LARGEST // inner))
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(cols, inner, dtype=dtype)
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _seconds(lambda: left @ right.t())
    copy = _seconds(lambda: target.copy_(source))
    return Rates(2 * rows * inner * cols / product, 2 * _COPIED / copy)


def _seconds(run: Callable[[], object]) -> float:
    """Mean seconds of repeated runs after one to warm up: the mean, so that other processes count in proportion."""
    run()
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _BUDGET or count < _LEAST:
        run()
        count += 1
    return passed / count
