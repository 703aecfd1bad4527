"""Triton kernels for operations around the GEMMs of FP8 training: casting rows to FP8, and transposing codes.

`fused.py` calls them, on devices on which it has found their results to be equal to those of torch.
"""

from __future__ import annotations

import struct
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8pipe.numerics.grids import AMAX_FLOOR, FloatGrid

_FLOOR_BITS: Final = struct.unpack("<i", struct.pack("<f", AMAX_FLOOR))[0]
_PER_THREAD: Final = 32  # number of elements of a row per thread, few enough to stay in registers
_TILE: Final = 64


# Other parameters are not annotated, because Triton compiles the annotations too and resolves only its own names.
@triton.jit  # type: ignore[untyped-decorator]
def cast_rows(  # type: ignore[no-untyped-def]
    x, codes, scales, columns, stride, MAX_BITS: tl.constexpr, FLOOR_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Cast a row of bf16 `x` to FP8 codes with a power-of-two scale; each program reads one row once.

    The scale is that of `grids.power_of_two_scale`, computed from the bit patterns of fp32 numbers. The maximum of the
    magnitudes is also computed from bit patterns, where NaN is larger than any number; a floating-point maximum would
    ignore NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    # 0x3F800000 is 1.0; adding 0x7FFFFF (a full mantissa) rounds up to a power of two; the mask keeps the exponent.
    scale = (tl.maximum(amax, FLOOR_BITS) + (0x3F800000 + 0x7FFFFF - MAX_BITS)) & 0x7F800000
    inverse = (254 << 23) - scale
    infinite = amax >= 0x7F800000  # infinity or NaN makes the whole row NaN, as in torch
    scale = tl.where(infinite, 0x7FC00000, scale)
    inverse = tl.where(infinite, 0x7FC00000, inverse)
    quotients = values * inverse.to(tl.float32, bitcast=True)
    tl.store(codes + row * columns + at, quotients.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale.to(tl.float32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def transpose_tile(source, target, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Transpose one tile of a byte matrix `(rows, columns)`, so that both matrices are accessed along their rows."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(source + i[:, None] * columns + j[None, :], mask=inside, other=0)
    tl.store(target + j[:, None] * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))


def block_of(columns: int) -> tuple[int, int]:
    """For rows of `columns` elements, the block size of a `cast_rows` program, a power of two, and its warps."""
    block = max(128, triton.next_power_of_2(columns))
    return block, min(32, max(1, block // (32 * _PER_THREAD)))


def quantize_rows(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a matrix, each with a power-of-two scale.

    Args:
        x: `(rows, cols)` bf16, with unit column stride.
        grid: the grid of the codes.

    Returns:
        Codes `(rows, cols)`, and scales `(rows, 1)` in fp32.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=grid.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block, warps = block_of(columns)
    cast_rows[(rows,)](
        x, codes, scales, columns, x.stride(0), MAX_BITS=grid.max_bits, FLOOR_BITS=_FLOOR_BITS, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return codes, scales


def transpose_bytes(codes: Tensor) -> Tensor:
    """The transpose of contiguous uint8 codes `(rows, cols)`, as a contiguous tensor."""
    rows, columns = codes.shape
    target = torch.empty(columns, rows, dtype=torch.uint8, device=codes.device)
    transpose_tile[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](codes, target, rows, columns, TILE=_TILE)
    return target
