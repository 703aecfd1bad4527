"""The number formats: FP8 and integer grids, their casts, and the direction of every scale.

One module owns rounding, so that training, export and every test speak of the same 256 codes.

Directions. `scale_quant` multiplies when quantizing (`code = round(x * scale_quant)`, FALQON's convention);
`scale_dequant` multiplies when dequantizing (`x ~ code * scale_dequant`, vLLM's and TensorRT's convention).
A scale without its direction in its name does not exist in this project: a reciprocal loads without error
and serves garbage.

Casts saturate before rounding. Whether a framework's own FP8 cast saturates depends on its version and device
(torch 2.13 on a CPU saturates E4M3 and sends E5M2 overflow to infinity), so the clamp is always ours.
Formats: OCP 8-bit floating point specification, revision 1.0 (E4M3 here is the "FN" variant: no infinity).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["E4M3", "E5M2", "FloatGrid", "IntGrid", "amax_scale_quant", "dequantize"]

# Below this an amax counts as zero; the scale stays finite (torchao uses the same floor).
AMAX_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """An 8-bit floating-point format held in torch's own dtype.

    Attributes:
        name: the format's usual name.
        dtype: the torch dtype that stores one code a byte.
        max: largest finite magnitude.
        min_normal: smallest normal magnitude.
        min_subnormal: smallest non-zero magnitude.
        mantissa_bits: explicit mantissa bits.
    """

    name: str
    dtype: torch.dtype
    max: float
    min_normal: float
    min_subnormal: float
    mantissa_bits: int

    def cast(self, values: Tensor) -> Tensor:
        """Round code-unit values to the grid: saturating, nearest, ties to even; NaN stays NaN.

        Args:
            values: any float dtype, any shape, in code units (already multiplied by `scale_quant`). Pass
                fp32 or fp64: a bf16 product has been rounded once already.

        Returns:
            A new tensor of the same shape and `self.dtype`.
        """
        clamped = values.clamp(-self.max, self.max)
        return (_to_odd_fp32(clamped) if clamped.dtype == torch.float64 else clamped).to(self.dtype)

    def quantize(self, x: Tensor, scale_quant: Tensor) -> Tensor:
        """Quantize `x` (any float dtype) by `scale_quant` (fp32, broadcastable) in fp32 arithmetic."""
        return self.cast(x.float() * scale_quant)

    def table(self) -> Tensor:
        """All 256 codes decoded: fp32 `(256,)`, indexed by the code's byte; NaN codes decode to NaN."""
        return _float_table(self.dtype).clone()

    def is_nan(self, codes: Tensor) -> Tensor:
        """Boolean mask of NaN codes."""
        return torch.isnan(codes.float())


@lru_cache(maxsize=4)
def _float_table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()


def _to_odd_fp32(values: Tensor) -> Tensor:
    """fp64 -> fp32, rounded to odd, so that rounding the result again equals rounding `values` once.

    torch casts fp64 to FP8 by way of fp32 rounded to nearest, where 1.0625 + 1e-12 becomes a tie.
    """
    nearest = values.float()
    back = nearest.double()
    # Towards zero is one unit below, when nearest went away from zero; then the last bit marks inexactness.
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).int()
    return (bits | (back != values).logical_and(~values.isnan()).int()).view(torch.float32)


E4M3 = FloatGrid("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-6, 2.0**-9, 3)
E5M2 = FloatGrid("e5m2", torch.float8_e5m2, 57344.0, 2.0**-14, 2.0**-16, 2)


@dataclass(frozen=True, slots=True)
class IntGrid:
    """A linear integer format of 2 to 8 bits, held in int8 or uint8.

    Attributes:
        bits: width, 2 to 8.
        signed: two's complement when true.
        narrow: drop the most negative code, so that the grid is symmetric (weights).
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer grids have 2 to 8 bits, got {self.bits}")
        if self.narrow and not self.signed:
            raise ValueError("an unsigned grid has no most negative code to drop")

    @property
    def min(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def max(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype: int8, or uint8 for unsigned grids."""
        return torch.int8 if self.signed else torch.uint8

    def quantize(self, x: Tensor, scale_dequant: Tensor, zero_point: Tensor | int = 0) -> Tensor:
        """`round(x / scale_dequant) + zero_point`, clamped: ONNX QuantizeLinear's formula (ties to even).

        Args:
            x: float, any shape, no NaN.
            scale_dequant: fp32, positive, broadcastable.
            zero_point: integer code that stands for 0.

        Returns:
            Codes in `self.dtype`.

        Raises:
            ValueError: `x` holds NaN; an integer grid has no code for it.
        """
        if torch.isnan(x).any():
            raise ValueError("NaN cannot be quantized to an integer grid")
        codes = torch.round(x.float() / scale_dequant) + zero_point
        return codes.clamp(self.min, self.max).to(self.dtype)

    def dequantize(self, codes: Tensor, scale_dequant: Tensor, zero_point: Tensor | int = 0) -> Tensor:
        """`(code - zero_point) * scale_dequant` in fp32."""
        return (codes.float() - zero_point) * scale_dequant


def amax_scale_quant(amax: Tensor, grid: FloatGrid) -> Tensor:
    """The scale that maps `amax` onto the grid's largest value, for multiplying when quantizing.

    The division runs in fp64 and is stored as fp32: eager and compiled fp32 division differ by one unit.

    Args:
        amax: non-negative, any shape.
        grid: the target format.

    Returns:
        fp32, shape of `amax`; finite for amax = 0.
    """
    return (grid.max / amax.double().clamp(min=AMAX_FLOOR)).float()


def dequantize(codes: Tensor, scale_dequant: Tensor) -> Tensor:
    """`code * scale_dequant` in fp32; `scale_dequant` is a scalar, or one value a row as `(rows, 1)`."""
    return codes.float() * scale_dequant.float()
