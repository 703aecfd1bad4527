"""Casting activations and gradients to FP8, and decoding weights, on either device.

Two scale rules. `exact` is FALQON's own: one `scale_quant = max / amax` a tensor. `power-of-two` rounds that down to a
power of two, one a row (token) for activations and one a tensor for weights. E4M3 is a floating format, so relative
precision is untouched (at most one of 18 binades of range is spent), while scaling becomes exact: a dequantized
code is exactly a bf16 number. On a CPU one bf16 GEMM of dequantized operands therefore equals the FP8 GEMM with
no rescaling pass, and a bf16 engine serves exactly the trained weights. A scale a token, as engines use when they
serve, keeps one outlier token from pushing all others into the subnormals.

On a CPU a cast tensor is kept as its dequantized value (`Cast.values`), on CUDA as its codes.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pipe.numerics import native
from fp8pipe.numerics.grids import AMAX_FLOOR, E4M3, FloatGrid, amax_scale_quant
from fp8pipe.numerics.kinds import ScaleRule


@dataclass(frozen=True, slots=True)
class Cast:
    """A `(rows, cols)` tensor on an FP8 grid.

    Attributes:
        values: on a CPU the dequantized values (bf16 or fp32), on CUDA the FP8 codes.
        scale_quant: fp32, scalar or `(rows, 1)`, it multiplied before rounding; None where the CPU's compiled
            cast did not need to keep it.
    """

    values: Tensor
    scale_quant: Tensor | None


def power_of_two_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """Largest power of two that maps `amax` (fp32, any shape) onto the grid, fp32; NaN for NaN and infinity.

    A poisoned amax must poison the result: the training loop then stops on a NaN loss instead of learning
    from clamped garbage. The floor of amax keeps the scale and its reciprocal normal fp32 numbers.
    """
    # frexp: ratio = mantissa * 2^exponent with mantissa in [0.5, 1), so floor(log2(ratio)) = exponent - 1.
    ratio = grid.max / amax.double().clamp(min=AMAX_FLOOR)
    exponent = torch.frexp(ratio).exponent - 1
    scale = torch.ldexp(torch.ones_like(ratio), exponent)
    return torch.where(torch.isfinite(amax), scale, math.nan).float()


def cast(x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Cast:
    """Round `x` to `grid` with dynamic scales.

    Args:
        x: `(rows, cols)` bf16 or fp32.
        grid: target format.
        rule: `exact`: one scale, and fp32 values on a CPU; `power-of-two`: a scale a row, and on a CPU values in
            x's own dtype (exact).
        out: optional destination `(rows, cols)` with unit column stride, e.g. a slice of a wider buffer, of the
            dtype that the result has.

    Returns:
        The cast tensor; `values` is `out` when given.
    """
    on_cpu = x.device.type == "cpu"
    if rule is ScaleRule.POWER_OF_TWO and on_cpu and x.dtype == torch.bfloat16 and x.stride(1) == 1:
        lib = native.library()
        if lib is not None:
            return Cast(_native_cast(lib, x, grid, torch.empty_like(x) if out is None else out), None)
    if rule is ScaleRule.EXACT:
        scale = amax_scale_quant(x.abs().amax(), grid)
    else:
        scale = power_of_two_scale(x.abs().amax(1, keepdim=True).float(), grid)
    codes = grid.quantize(x, scale)
    values = codes
    if on_cpu:
        values = codes.float() / scale
        values = values if rule is ScaleRule.EXACT else values.to(x.dtype)
    return Cast(values if out is None else out.copy_(values), scale)


def _native_cast(lib: ctypes.CDLL, x: Tensor, grid: FloatGrid, out: Tensor) -> Tensor:
    lib.fp8pipe_cast_rows_bf16(
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[0], x.shape[1], grid.mantissa_bits,
        round(math.log2(grid.min_normal)), grid.max, AMAX_FLOOR,
    )  # fmt: skip
    return out


def decode(codes: Tensor, scale_quant: Tensor, rule: ScaleRule, dtype: torch.dtype) -> Tensor:
    """Dequantize E4M3 weight codes on a CPU: `code / scale_quant`.

    Args:
        codes: `(rows, cols)` float8_e4m3fn, contiguous.
        scale_quant: fp32 scalar.
        rule: with `power-of-two` the result is exact in any dtype.
        dtype: bf16 or fp32 (`exact` always returns fp32, as rounding to bf16 would lose bits).

    Returns:
        New `(rows, cols)` tensor.
    """
    if rule is ScaleRule.EXACT:
        return codes.float() / scale_quant
    lib = native.library()
    if lib is None or dtype != torch.bfloat16 or not codes.is_contiguous():
        return (codes.float() / scale_quant).to(dtype)
    scale = 1.0 / scale_quant.item()
    if not 2.0**-100 <= scale <= 2.0**100:  # nor NaN: a poisoned scale stays torch's affair
        return (codes.float() / scale_quant).to(dtype)
    values = torch.empty(codes.shape, dtype=torch.bfloat16)
    lib.fp8pipe_decode_e4m3(codes.data_ptr(), values.data_ptr(), codes.numel(), scale)
    return values


def decode_units(codes: Tensor) -> Tensor:
    """E4M3 codes (any shape) as fp32 in code units, on either device."""
    lib = native.library() if codes.device.type == "cpu" and codes.is_contiguous() else None
    if lib is None:
        return codes.float()
    values = torch.empty(codes.shape)
    lib.fp8pipe_decode_e4m3_fp32(codes.data_ptr(), values.data_ptr(), codes.numel())
    return values


def meld_rows(codes: Tensor, rows: Tensor, update: Tensor) -> bool:
    """`codes[rows] = round(codes[rows] + update)` to nearest, in place, in one pass over those rows.

    Args:
        codes: `(out, in)` float8_e4m3fn.
        rows: distinct int64 row indices.
        update: `(len(rows), in)` fp32 code units.

    Returns:
        False, having done nothing, where the compiled kernel cannot serve; torch does it then.
    """
    lib = native.library() if codes.device.type == "cpu" and codes.is_contiguous() else None
    if lib is None:
        return False
    rows, update = rows.contiguous(), update.contiguous()
    lib.fp8pipe_meld_rows_e4m3(codes.data_ptr(), rows.data_ptr(), rows.numel(), codes.shape[1], update.data_ptr())
    return True


def quantize_weight(matrix: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """One per-tensor E4M3 scale for a whole weight: `(codes, scale_quant)`; codes are contiguous."""
    amax = matrix.abs().amax().float()
    scale = amax_scale_quant(amax, E4M3) if rule is ScaleRule.EXACT else power_of_two_scale(amax, E4M3)
    return E4M3.quantize(matrix, scale).contiguous(), scale
