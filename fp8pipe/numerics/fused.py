"""Fused Triton kernels for CUDA, used only after each has been checked against torch on the device at hand.

In eager mode, torch casts a matrix with six kernels and 5 bytes of memory traffic per element; a fused kernel that
makes one pass over each row needs 3. torch's transpose of a byte matrix reads rows and writes columns one
byte at a time. Both matter only in eager mode: `torch.compile` generates its own kernels from the torch operators, so
the operators are kept there.

A kernel is used on a device only if its codes there equal those of `grids.quantize`, for every bf16 number and for
rows of many widths. If anything is wrong (no Triton, no compiler for its launcher, a differing code), torch is used
instead, with the same results bit for bit, and a warning is logged once.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule

_LOG = logging.getLogger(__name__)
_KERNELS: Final = "fp8pipe.numerics.triton_kernels"
WIDEST: Final = 1 << 15  # the widest row that fits into registers
_CHECKED_WIDTHS: Final = (1, 37, 640, 4096, 11008, WIDEST)


def quantize_rows(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale] | None:
    """`grids.quantize` with one power-of-two scale per row, in one pass; None if no kernel can do it.

    Args:
        x: `(rows, cols)`, on CUDA. The kernel supports bf16 with unit column stride and at most `WIDEST` columns.
        grid: E4M3 or E5M2.
    """
    fits = x.dtype == torch.bfloat16 and x.dim() == 2 and 0 < x.shape[1] <= WIDEST and x.shape[0] > 0
    if not (_here(x) and fits and x.stride(1) == 1):
        return None
    with torch.cuda.device(x.device):
        codes, scale = _kernels().quantize_rows(x, grid)
    return codes, Scale(scale)


def transpose_bytes(codes: Tensor) -> Tensor:
    """The transpose of a byte matrix `(rows, cols)` as a contiguous `(cols, rows)` tensor, on any device."""
    if not (_here(codes) and codes.is_contiguous() and codes.numel()):
        return codes.t().contiguous()
    with torch.cuda.device(codes.device):
        transposed: Tensor = _kernels().transpose_bytes(codes)
    return transposed


def _here(tensor: Tensor) -> bool:
    # Under torch.compile the torch operators are kept, since the compiler fuses them itself.
    return tensor.is_cuda and not torch.compiler.is_compiling() and ready(tensor.device)


def ready(device: torch.device) -> bool:
    """Whether the kernels run on a device and are correct there; checked once per process and device."""
    if device.type != "cuda" or torch.version.cuda is None:  # in a CPU build of torch, CUDA tensors are fake tensors
        return False
    return _checked(device.index if device.index is not None else torch.cuda.current_device())


def _kernels() -> ModuleType:
    return importlib.import_module(_KERNELS)


@lru_cache
def _checked(index: int) -> bool:
    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False  # these GPUs have no FP8 tensor cores either
    try:
        with torch.cuda.device(device):
            wrong = first_difference(_kernels(), device)
    except Exception as error:  # Triton, its compiler and the driver raise exceptions of many types
        wrong = f"{type(error).__name__}: {error}".partition("\n")[0]
    if wrong is not None:
        _LOG.warning(
            "Triton's FP8 kernels are not used on %s, torch casts instead (same bits, slower): %s", device, wrong
        )
    return wrong is None


def first_difference(kernels: ModuleType, device: torch.device) -> str | None:
    """The first error in the results of `kernels` (a module like `triton_kernels`) on a device; None if correct."""
    for x in (_every_number(), *(_rows(width) for width in _CHECKED_WIDTHS)):
        here = x.to(device)
        for grid in (E4M3, E5M2):
            (codes, scale), (expected, right) = (
                kernels.quantize_rows(here, grid), quantize(here, grid, ScaleRule.POWER_OF_TWO, per_row=True)
            )  # fmt: skip
            # NaN has two encodings, and no cast guarantees which one it writes.
            equal = (codes.view(torch.uint8) == expected.view(torch.uint8)) | (_nan(codes) & _nan(expected))
            if not torch.equal(scale.nan_to_num(-1.0), right.value.nan_to_num(-1.0)):
                return f"scales of rows of {x.shape[1]} differ in {grid.name}"
            if not bool(equal.all()):
                return f"{int((~equal).sum())} of {equal.numel()} codes differ in {grid.name}, rows of {x.shape[1]}"
    for rows, columns in ((64, 64), (37, 130), (1, 999)):
        codes = torch.arange(rows * columns, device=device).to(torch.uint8).view(rows, columns)
        if not torch.equal(kernels.transpose_bytes(codes), codes.t()):
            return f"the transpose of {rows} x {columns} bytes differs"
    return None


def _nan(codes: Tensor) -> Tensor:
    return codes.float().isnan()


def _every_number() -> Tensor:
    """All bf16 numbers up to 448, 128 per row, with 448 prepended to each row so that the row's scale is 1."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    taken = bits[bits.abs() <= E4M3.max]
    rows = torch.cat([taken, taken.new_zeros(-len(taken) % 128)]).view(-1, 128)
    return torch.cat([rows.new_full((len(rows), 1), E4M3.max), rows], 1)


def _rows(columns: int) -> Tensor:
    """Gaussian rows of many magnitudes, some with an infinity, a NaN or an outlier; and constant rows, one of zeros."""
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(24, columns, generator=random) * torch.exp2(12 * torch.randn(24, 1, generator=random))
    x[:4] *= torch.exp2(8 * torch.randn(4, columns, generator=random))
    x[4], x[5, 0], x[6, -1], x[7, 0] = 0.0, torch.inf, torch.nan, 1e30
    x[8], x[9] = 1e-30, -3e38
    return x.bfloat16()
