"""Selects between fused Triton kernels and torch operations on CUDA devices; the results are the same bit for bit.

In eager mode, torch casts a matrix with six kernels and 5 bytes of memory traffic per element, whereas a fused kernel
that makes one pass over each row needs 3 bytes; and torch transposes a matrix of bytes by reading rows and writing
columns one byte at a time. Under `torch.compile` the torch operations are used, because the compiler fuses them itself.

The Triton kernels are used on a device only if their results on this device equal those of the torch operations, for
every bf16 number and for rows of many widths. If anything fails (Triton or the compiler for its launcher is missing, or
a code differs), the torch operations are used, and a warning is logged once.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fp8pipe.core.errors import class_and_first_line
from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule

_LOG = logging.getLogger(__name__)
_KERNELS: Final = "fp8pipe.numerics.triton_kernels"
WIDEST: Final = 1 << 15  # the widest row that fits into registers
_CHECKED_WIDTHS: Final = (1, 37, 640, 4096, 11008, WIDEST)


def quantize_rows(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale] | None:
    """Do the same as `grids.quantize` with one power-of-two scale per row, in one pass.

    Args:
        x: `(rows, cols)`, on CUDA. The kernel supports bf16 with unit column stride and at most `WIDEST` columns.
        grid: E4M3 or E5M2.

    Returns:
        Codes and scale; None if the kernel does not support `x` or is not used on its device.
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
    # Whether the kernels are used for this tensor; torch.compile fuses the torch operations itself.
    return tensor.is_cuda and not torch.compiler.is_compiling() and ready(tensor.device)


def ready(device: torch.device) -> bool:
    """Whether the kernels run on a device and give correct results; checked once per process and device."""
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
        wrong = class_and_first_line(error)
    if wrong is not None:
        _LOG.warning(
            "Triton's FP8 kernels are not used on %s, torch casts instead (same bits, slower): %s", device, wrong
        )
    return wrong is None


def first_difference(kernels: ModuleType, device: torch.device) -> str | None:
    """Compare the results of kernels with those of torch.

    Args:
        kernels: a module with the functions of `triton_kernels`.
        device: the device to run them on.

    Returns:
        Description of the first difference; None if all results are equal.
    """
    for x in (_every_number(), *(_rows(width) for width in _CHECKED_WIDTHS)):
        here = x.to(device)
        for grid in (E4M3, E5M2):
            (codes, scale), (expected, right) = (
                kernels.quantize_rows(here, grid), quantize(here, grid, ScaleRule.POWER_OF_TWO, per_row=True)
            )  # fmt: skip
            # NaN has several encodings, and a cast may produce any of them.
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
    """Test data: all bf16 numbers from -448 to 448, 128 per row, preceded by 448 so that the scale of the row is 1."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    taken = bits[bits.abs() <= E4M3.max]
    rows = torch.cat([taken, taken.new_zeros(-len(taken) % 128)]).view(-1, 128)
    return torch.cat([rows.new_full((len(rows), 1), E4M3.max), rows], 1)


def _rows(columns: int) -> Tensor:
    """Test data: Gaussian rows of different magnitudes, some with infinity, NaN or an outlier, and constant rows."""
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(24, columns, generator=random) * torch.exp2(12 * torch.randn(24, 1, generator=random))
    x[:4] *= torch.exp2(8 * torch.randn(4, columns, generator=random))
    x[4], x[5, 0], x[6, -1], x[7, 0] = 0.0, torch.inf, torch.nan, 1e30
    x[8], x[9] = 1e-30, -3e38
    return x.bfloat16()
