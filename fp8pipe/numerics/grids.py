"""The FP8 formats, rounding to them, and their scales: the definitions shared by training, export and all tests.

Casts clamp before rounding. Whether a framework's own FP8 cast saturates depends on its version and device (torch 2.13
on a CPU saturates E4M3 but turns E5M2 overflow into infinity), so this module always clamps explicitly.
Formats: OCP 8-bit floating point specification, revision 1.0 (E4M3 here is the "FN" variant: no infinity).

Scales have one direction, `dequantized = code * scale`. A checkpoint with reciprocal scales loads without error and
serves garbage, so no function takes or returns one. Two rules derive the scale from the largest magnitude (amax):

* `power-of-two`: the smallest power of two with which amax fits the grid. E4M3 is a floating-point format, so relative
  precision is unaffected (the cost is at most one of 18 binades of range), while scaling becomes exact: a dequantized
  code is exactly a bf16 number, and dividing by the scale equals multiplying by its reciprocal.
* `exact`: the rule of FALQON's released code, which multiplies by `max / amax`, rounded once to fp32, and later divides
  by the same number. Only the finally stored scale has the direction above, so this rule alone keeps the multiplier.

Weights: `channel_scale`, `dequantize_weight` and `quantize_weight` convert between weights, E4M3 codes and the scales
that vLLM reads. If a fused layer of vLLM (q/k/v, gate/up) has per-tensor scales, vLLM requantizes all of its parts to
the largest of them, which changes codes. A scalar repeated for every row is read as a per-channel scale and keeps every
code, so a per-tensor weight is exported as per-channel with equal scales: the same numbers, bit for bit. A linear
weight is `(out, in)`; GPT-2's Conv1D stores `(in, out)`, which is called transposed here. Scales are `(out, 1)` in both
cases, as vLLM declares them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8pipe.numerics.kinds import ScaleRule


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """An 8-bit floating-point format, stored in the corresponding torch dtype."""

    name: str  # the format's usual name
    dtype: torch.dtype  # the torch dtype that stores one code per byte
    max: float  # largest finite magnitude
    min_normal: float  # smallest normal magnitude
    mantissa_bits: int  # explicit mantissa bits
    max_bits: int = field(init=False, repr=False)  # bit pattern of `max` as an fp32 number

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bits", struct.unpack("<i", struct.pack("<f", self.max))[0])

    def cast(self, values: Tensor) -> Tensor:
        """Round values, already divided by their scale, to the grid: saturating, nearest, ties to even; NaN stays NaN.

        Any shape. Pass fp32 or fp64, since a bf16 quotient would already have been rounded once.
        """
        clamped = values.clamp(-self.max, self.max)
        return (_to_odd_fp32(clamped) if clamped.dtype == torch.float64 else clamped).to(self.dtype)


def _to_odd_fp32(values: Tensor) -> Tensor:
    """fp64 to fp32, rounded to odd, so that rounding the result to FP8 equals rounding `values` directly.

    torch casts fp64 to FP8 via fp32, rounding to nearest, which turns 1.0625 + 1e-12 into a tie (double rounding).
    """
    nearest = values.float()
    back = nearest.double()
    # Truncate: one ulp less where rounding to nearest went away from zero. Then set the last bit if inexact.
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).int()
    return (bits | (back != values).logical_and(~values.isnan()).int()).view(torch.float32)


E4M3 = FloatGrid("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-6, 3)
E5M2 = FloatGrid("e5m2", torch.float8_e5m2, 57344.0, 2.0**-14, 2)


_EXPONENT = 0xFF << 23  # mask of the exponent bits of an fp32 number
_ONE_AND_LESS_THAN_A_BINADE = (127 << 23) + (1 << 23) - 1

_BLOCK_VALUES = 1 << 24  # 64 MB in fp32

# Lower bound for amax: it keeps the scale of an all-zero tensor a positive normal number (torchao uses the same value).
AMAX_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Scale:
    """`dequantized = code * value`."""

    value: Tensor  # fp32, a scalar or `(rows, 1)`
    inverse_scale: Tensor | None = None  # the multiplier of the rule `exact`, applied before rounding; otherwise None
    columns: Tensor | None = None  # a scalar `value` repeated to `(columns,)`, for GEMMs with per-column scales
    one: Tensor | None = None  # a scalar tensor with the value 1, for GEMMs that require a scale

    @classmethod
    def exact(cls, inverse_scale: Tensor) -> Scale:
        """The scale for FALQON's multiplier `max / amax`, fp32."""
        return cls(inverse_scale.double().reciprocal().float(), inverse_scale)

    @property
    def rule(self) -> ScaleRule:
        """The rule that the scale was computed by."""
        return ScaleRule.POWER_OF_TWO if self.inverse_scale is None else ScaleRule.EXACT

    def quantize(self, x: Tensor, grid: FloatGrid) -> Tensor:
        """Codes of `x` (any float dtype), computed in fp32."""
        return grid.cast(x.float() * (self.value.reciprocal() if self.inverse_scale is None else self.inverse_scale))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Dequantized values of codes, fp32."""
        return codes.float() * self.value if self.inverse_scale is None else codes.float() / self.inverse_scale


def amax_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """The scale that maps `amax` (any shape) onto the grid's largest value, fp32, positive.

    The division is in fp64, because eager and compiled fp32 divisions can differ by one ulp.
    """
    return (amax.double().clamp(min=AMAX_FLOOR) / grid.max).float()


def power_of_two_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """Smallest power-of-two scale with which `amax` (fp32, any shape) fits the grid, fp32; NaN for NaN and infinity.

    A non-finite amax must propagate, so that the training loop stops on a NaN loss instead of learning from clamped
    garbage.
    """
    # The bit patterns of positive floats are ordered like their values, and a binade spans 2^23 of them. So amax / max,
    # rounded up to a power of two, is the difference of the bit patterns, rounded up to a multiple of 2^23. No step is
    # inexact, and a GPU needs only a few operations.
    bits = amax.clamp(min=AMAX_FLOOR).view(torch.int32)
    scale = (bits + (_ONE_AND_LESS_THAN_A_BINADE - grid.max_bits) & _EXPONENT).view(torch.float32)
    return torch.add(scale, amax, alpha=0)  # infinity times 0 is NaN


def quantize(x: Tensor, grid: FloatGrid, rule: ScaleRule, *, per_row: bool = False) -> tuple[Tensor, Scale]:
    """Round `x` `(rows, cols)` to a grid, with one scale in total or one per row: contiguous codes, and the scale."""
    scale = amax_to_scale((x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()).float(), grid, rule)
    return scale.quantize(x, grid).contiguous(), scale


def amax_to_scale(amax: Tensor, grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The scale that `rule` derives from the largest magnitudes `amax` (fp32, a scalar or `(rows, 1)`)."""
    if rule is ScaleRule.EXACT:
        return Scale.exact((grid.max / amax.double().clamp(min=AMAX_FLOOR)).float())
    return Scale(power_of_two_scale(amax, grid))


def quantize_stacked(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> tuple[Tensor, Scale]:
    """`quantize` several matrices `(rows, cols)`, stacked along the rows, with one scale; works in small blocks."""
    scale = stacked_scale(weights, grid, rule)
    rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    codes = torch.empty(rows, cols, dtype=grid.dtype, device=weights[0].device)
    start = 0
    for block in (block for weight in weights for block in row_blocks(weight)):
        codes[start : start + block.shape[0]] = scale.quantize(block, grid)
        start += block.shape[0]
    return codes, scale


def stacked_scale(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The scale that several matrices share."""
    amax = torch.stack([block.abs().amax().float() for weight in weights for block in row_blocks(weight)]).amax()
    return amax_to_scale(amax, grid, rule)


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows of a matrix, each small enough (64 MB in fp32) for temporary copies."""
    blocks: tuple[Tensor, ...] = matrix.split(max(1, _BLOCK_VALUES // matrix.shape[1]))
    return blocks


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def channel_scale(scale: Tensor, rows: int) -> Tensor:
    """Expand a per-tensor scale `()` or `(1,)` to one scale per output row, fp32 `(rows, 1)`; keep a per-row scale.

    Raises:
        ValueError: any other shape or dtype.
    """
    if scale.dtype != torch.float32:
        raise ValueError(f"a weight scale is float32, got {scale.dtype}")
    if scale.shape == (rows, 1):
        return scale.contiguous()
    if scale.shape in {torch.Size([]), torch.Size([1])}:
        return scale.reshape(1, 1).repeat(rows, 1)
    raise ValueError(f"a weight scale is () or ({rows}, 1), got {tuple(scale.shape)}")


def dequantize_weight(codes: Tensor, scale: Tensor, *, transposed: bool = False) -> Tensor:
    """`code * scale`, fp32: codes `(out, in)`, or `(in, out)` when `transposed`, scale `()`, `(1,)` or `(out, 1)`."""
    return codes.float() * (scale.reshape(1, -1) if transposed and scale.ndim == 2 else scale).float()


def quantize_weight(weight: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest E4M3 codes, with one scale per output row (amax maps to 448).

    The scale is computed in fp64 and stored in fp32; the codes come from an fp32 division by that stored scale, so
    every reader gets the same `code * scale`. A row of zeros gets a tiny positive scale.

    Args:
        weight: finite, any float dtype, `(out, in)`, or `(in, out)` when `transposed`.
        transposed: whether outputs lie along the second axis.

    Returns:
        Codes, float8_e4m3fn in the shape of `weight`, and the positive scale, fp32 `(out, 1)`.
    """
    values = weight.float()
    axis = 0 if transposed else 1
    # Unlike abs(), this makes no fp32 copy of the weight; and torch's aminmax() along an axis is six times slower.
    amax = torch.maximum(values.amin(dim=axis, keepdim=True).neg(), values.amax(dim=axis, keepdim=True))
    scale = amax_scale(amax, E4M3)
    return E4M3.cast(values / scale), scale.reshape(-1, 1).contiguous()


def to_bf16(values: Tensor) -> Tensor:
    """Round to bf16 (nearest, ties to even); any shape. Returns a new tensor unless `values` is bf16 already."""
    return values.to(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal (so -0 differs from 0, and a NaN equals the same NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference, divided by that of `reference` unless that is zero; norms in fp32."""
    norm = float(torch.linalg.vector_norm(reference.float()))
    error = float(torch.linalg.vector_norm(approximation.float() - reference.float()))
    return error / norm if norm > 0.0 else error
