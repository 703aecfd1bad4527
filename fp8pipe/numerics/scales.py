"""FP8 scales, in one direction: `dequantized = code * scale`, and how they follow from the largest magnitude.

A reciprocal scale loads without error and serves garbage, so no function takes or gives one. The rules:

* `power-of-two`: the smallest power of two under which the largest magnitude fits the grid. E4M3 is a floating format,
  so relative precision is untouched (at most one of 18 binades of range is spent), while scaling becomes exact: a
  dequantized code is exactly a bf16 number, and dividing by the scale is multiplying by its reciprocal.
* `exact`: FALQON's own. Its code multiplies by `max / amax`, rounded to fp32 once, and divides by the same number. Only
  what is stored in the end is a scale of our direction, so this rule alone keeps that multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pipe.numerics.grids import FloatGrid
from fp8pipe.numerics.kinds import ScaleRule

__all__ = ["AMAX_FLOOR", "Scale", "amax_scale", "power_of_two_scale", "quantize"]

# Below this an amax counts as zero; the scale stays a normal number (torchao uses the same floor).
AMAX_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Scale:
    """`dequantized = code * value`.

    Attributes:
        value: fp32, a scalar or `(rows, 1)`.
        inverse_scale: what the rule `exact` multiplies by before rounding; None for powers of two.
    """

    value: Tensor
    inverse_scale: Tensor | None = None

    @classmethod
    def exact(cls, inverse_scale: Tensor) -> Scale:
        """The scale of FALQON's multiplier `max / amax`, fp32."""
        return cls(inverse_scale.double().reciprocal().float(), inverse_scale)

    @property
    def rule(self) -> ScaleRule:
        """The rule that it follows."""
        return ScaleRule.POWER_OF_TWO if self.inverse_scale is None else ScaleRule.EXACT

    def quantize(self, x: Tensor, grid: FloatGrid) -> Tensor:
        """Codes of `x` (any float dtype), computed in fp32."""
        return grid.cast(x.float() * (self.value.reciprocal() if self.inverse_scale is None else self.inverse_scale))

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes, fp32."""
        return codes.float() * self.value if self.inverse_scale is None else codes.float() / self.inverse_scale


def amax_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """The scale that maps `amax` (any shape) onto the grid's largest value, fp32, positive.

    The division runs in fp64: eager and compiled fp32 division differ by one unit.
    """
    return (amax.double().clamp(min=AMAX_FLOOR) / grid.max).float()


def power_of_two_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """Smallest power of two under which `amax` (fp32, any shape) fits the grid, fp32; NaN for NaN and infinity.

    A poisoned amax must poison the result: the training loop then stops on a NaN loss instead of learning
    from clamped garbage.
    """
    # frexp: ratio = mantissa * 2^exponent with mantissa in [0.5, 1), so floor(log2(ratio)) = exponent - 1.
    ratio = grid.max / amax.double().clamp(min=AMAX_FLOOR)
    scale = torch.ldexp(torch.ones_like(ratio), 1 - torch.frexp(ratio).exponent)
    return torch.where(torch.isfinite(amax), scale, math.nan).float()


def quantize(x: Tensor, grid: FloatGrid, rule: ScaleRule, *, per_row: bool = False) -> tuple[Tensor, Scale]:
    """Round `x` `(rows, cols)` to a grid, with one scale or one scale per row: contiguous codes, and the scale."""
    amax = (x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()).float()
    if rule is ScaleRule.EXACT:
        scale = Scale.exact((grid.max / amax.double().clamp(min=AMAX_FLOOR)).float())
    else:
        scale = Scale(power_of_two_scale(amax, grid))
    return scale.quantize(x, grid).contiguous(), scale
