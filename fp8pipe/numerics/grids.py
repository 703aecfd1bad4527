"""The FP8 formats and how values are rounded to them, so that training, export and every test speak of the same codes.

Casts saturate before rounding. Whether a framework's own FP8 cast saturates depends on its version and device
(torch 2.13 on a CPU saturates E4M3 and sends E5M2 overflow to infinity), so the clamp is always ours.
Formats: OCP 8-bit floating point specification, revision 1.0 (E4M3 here is the "FN" variant: no infinity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["E4M3", "E5M2", "FloatGrid"]


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """An 8-bit floating-point format held in torch's own dtype.

    Attributes:
        name: the format's usual name.
        dtype: the torch dtype that stores one code per byte.
        max: largest finite magnitude.
        min_normal: smallest normal magnitude.
        mantissa_bits: explicit mantissa bits.
    """

    name: str
    dtype: torch.dtype
    max: float
    min_normal: float
    mantissa_bits: int

    def cast(self, values: Tensor) -> Tensor:
        """Round code-unit values to the grid: saturating, nearest, ties to even; NaN stays NaN.

        Args:
            values: any float dtype, any shape, in code units (values over their scale). Pass fp32 or
                fp64: a bf16 quotient has been rounded once already.

        Returns:
            A new tensor of the same shape and `self.dtype`.
        """
        clamped = values.clamp(-self.max, self.max)
        return (_to_odd_fp32(clamped) if clamped.dtype == torch.float64 else clamped).to(self.dtype)


def _to_odd_fp32(values: Tensor) -> Tensor:
    """fp64 -> fp32, rounded to odd, so that rounding the result again equals rounding `values` once.

    torch casts fp64 to FP8 by way of fp32 rounded to nearest, where 1.0625 + 1e-12 becomes a tie.
    """
    nearest = values.float()
    back = nearest.double()
    # Towards zero is one unit below, when nearest went away from zero; then the last bit marks inexactness.
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).int()
    return (bits | (back != values).logical_and(~values.isnan()).int()).view(torch.float32)


E4M3 = FloatGrid("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-6, 3)
E5M2 = FloatGrid("e5m2", torch.float8_e5m2, 57344.0, 2.0**-14, 2)
