"""The FP8 formats, their scales, and rounding to them, as used in training, export and all tests.

The formats are those of the OCP 8-bit floating point specification, revision 1.0 (E4M3 is the "FN" variant, without
infinity). A format is called a grid here. Values beyond its range are always clamped explicitly before they are
rounded, because it depends on a framework's version and device whether its own FP8 cast saturates (torch 2.13 on a CPU
saturates E4M3, but turns E5M2 overflow into infinity).

Scales have one direction, `dequantized = code * scale`. A checkpoint with reciprocal scales loads without error and
gives wrong results, so no function takes or returns reciprocal scales. Two rules derive the scale from the largest
magnitude (amax):

* `power-of-two`: the smallest power of two with which amax fits the grid. E4M3 is a floating-point format, so its
  relative precision is not affected (the cost is at most one of 18 binades of range). Scaling becomes exact: a
  dequantized code is exactly a bf16 number, and dividing by the scale equals multiplying by its reciprocal.
* `exact`: the rule of FALQON's released code, which multiplies by `max / amax`, rounded once to fp32, and later divides
  by the same number. Only with this rule, the multiplier is kept during training (`Scale.inverse_scale`); the scale
  that is finally stored has the direction above.

`channel_scale`, `dequantize_weight` and `quantize_weight` convert between weights, E4M3 codes and the scales that vLLM
reads. If the parts of a fused layer (q/k/v, gate/up) have per-tensor scales, vLLM requantizes them to the largest of
these scales, which changes codes. So a per-tensor weight is exported with per-channel scales, all equal to its scale;
vLLM then keeps every code, and the dequantized weights are the same bit for bit. The weight of a linear layer is
`(out, in)`; that of GPT-2's Conv1D is `(in, out)`, which is called transposed here. Scales are `(out, 1)` in both
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
        """Round values to the grid: saturating, to nearest, ties to even; NaN stays NaN.

        Args:
            values: values that were divided by their scale, of any shape, in fp32 or fp64; quotients in bf16 would have
                been rounded once already.
        """
        clamped = values.clamp(-self.max, self.max)
        return (_to_odd_fp32(clamped) if clamped.dtype == torch.float64 else clamped).to(self.dtype)


def _to_odd_fp32(values: Tensor) -> Tensor:
    """Convert fp64 to fp32, rounding to odd, so that rounding the result to FP8 equals rounding `values` directly.

    torch casts fp64 to FP8 via fp32, where it rounds to nearest. This double rounding is wrong for values close to a
    tie: 1.0625 + 1e-12 becomes a tie.
    """
    nearest = values.float()
    back = nearest.double()
    # Truncate, by subtracting one ulp where rounding to nearest increased the magnitude. Set the last bit if inexact.
    bits = nearest.view(torch.int32) - (back.abs() > values.abs()).int()
    return (bits | (back != values).logical_and(~values.isnan()).int()).view(torch.float32)


E4M3 = FloatGrid("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-6, 3)
E5M2 = FloatGrid("e5m2", torch.float8_e5m2, 57344.0, 2.0**-14, 2)


_EXPONENT = 0xFF << 23  # mask of the exponent bits of an fp32 number
_ONE_AND_LESS_THAN_A_BINADE = (127 << 23) + (1 << 23) - 1

_BLOCK_VALUES = 1 << 24  # 64 MB in fp32

# Lower bound for amax, so that the scale of an all-zero tensor is a positive normal number; the same as in torchao.
AMAX_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of FP8 codes: `dequantized = code * value`."""

    value: Tensor  # fp32, a scalar or `(rows, 1)`
    inverse_scale: Tensor | None = None  # the multiplier of the rule `exact`, applied before rounding; otherwise None
    columns: Tensor | None = None  # a scalar `value` repeated to `(columns,)`, for GEMMs with per-column scales
    one: Tensor | None = None  # a scalar tensor with the value 1, for GEMMs that require a scale

    @classmethod
    def exact(cls, inverse_scale: Tensor) -> Scale:
        """The scale of the rule `exact` for the multiplier `max / amax`, fp32."""
        return cls(inverse_scale.double().reciprocal().float(), inverse_scale)

    @property
    def rule(self) -> ScaleRule:
        """The rule by which the scale was computed."""
        return ScaleRule.POWER_OF_TWO if self.inverse_scale is None else ScaleRule.EXACT

    def quantize(self, x: Tensor, grid: FloatGrid) -> Tensor:
        """Codes of `x` (any floating-point dtype) in the dtype of `grid`, computed in fp32."""
        return grid.cast(x.float() * (self.value.reciprocal() if self.inverse_scale is None else self.inverse_scale))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Dequantized values of codes, fp32."""
        return codes.float() * self.value if self.inverse_scale is None else codes.float() / self.inverse_scale


def amax_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """The scale `amax / grid.max`, fp32 and positive, for `amax` of any shape.

    It is computed in fp64, because eager and compiled fp32 divisions can differ by one ulp.
    """
    return (amax.double().clamp(min=AMAX_FLOOR) / grid.max).float()


def power_of_two_scale(amax: Tensor, grid: FloatGrid) -> Tensor:
    """Smallest power-of-two scale with which `amax` (fp32, any shape) fits the grid, fp32.

    It is NaN if amax is NaN or infinite, so that the training loop stops at a NaN loss instead of training on clamped
    values.
    """
    # The bit patterns of positive floats are ordered like their values, and a binade spans 2^23 of them. So amax / max,
    # rounded up to a power of two, is the difference of the bit patterns, rounded up to a multiple of 2^23. Every step
    # is exact, and takes only a few operations on a GPU.
    bits = amax.clamp(min=AMAX_FLOOR).view(torch.int32)
    scale = (bits + (_ONE_AND_LESS_THAN_A_BINADE - grid.max_bits) & _EXPONENT).view(torch.float32)
    return torch.add(scale, amax, alpha=0)  # infinity times 0 is NaN


def quantize(x: Tensor, grid: FloatGrid, rule: ScaleRule, *, per_row: bool = False) -> tuple[Tensor, Scale]:
    """Round a matrix to a grid.

    Args:
        x: `(rows, cols)`, any floating-point dtype.
        grid: the grid of the codes.
        rule: the rule for the scale.
        per_row: use one scale per row instead of one for the whole matrix.

    Returns:
        Contiguous codes `(rows, cols)`, and the scale.
    """
    scale = amax_to_scale((x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()).float(), grid, rule)
    return scale.quantize(x, grid).contiguous(), scale


def amax_to_scale(amax: Tensor, grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The scale that `rule` derives from the largest magnitudes `amax` (fp32, a scalar or `(rows, 1)`)."""
    if rule is ScaleRule.EXACT:
        return Scale.exact((grid.max / amax.double().clamp(min=AMAX_FLOOR)).float())
    return Scale(power_of_two_scale(amax, grid))


def quantize_stacked(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> tuple[Tensor, Scale]:
    """Quantize several matrices `(rows, cols)` with one common scale, and stack their codes along the rows.

    Works on blocks of rows, to limit memory use.
    """
    scale = stacked_scale(weights, grid, rule)
    rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    codes = torch.empty(rows, cols, dtype=grid.dtype, device=weights[0].device)
    start = 0
    for block in (block for weight in weights for block in row_blocks(weight)):
        codes[start : start + block.shape[0]] = scale.quantize(block, grid)
        start += block.shape[0]
    return codes, scale


def stacked_scale(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The common scale for several matrices, derived from their largest magnitude."""
    amax = torch.stack([block.abs().amax().float() for weight in weights for block in row_blocks(weight)]).amax()
    return amax_to_scale(amax, grid, rule)


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split a matrix into blocks of consecutive rows (views) of at most 64 MB in fp32, to limit temporary copies."""
    blocks: tuple[Tensor, ...] = matrix.split(max(1, _BLOCK_VALUES // matrix.shape[1]))
    return blocks


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def channel_scale(scale: Tensor, rows: int) -> Tensor:
    """The scale of a weight as one scale per output row, fp32 `(rows, 1)`.

    Args:
        scale: fp32; per tensor, `()` or `(1,)`, which is repeated, or per row, `(rows, 1)`.
        rows: number of output rows of the weight.

    Raises:
        ValueError: the scale has another shape or dtype.
    """
    if scale.dtype != torch.float32:
        raise ValueError(f"a weight scale is float32, got {scale.dtype}")
    if scale.shape == (rows, 1):
        return scale.contiguous()
    if scale.shape in {torch.Size([]), torch.Size([1])}:
        return scale.reshape(1, 1).repeat(rows, 1)
    raise ValueError(f"a weight scale is () or ({rows}, 1), got {tuple(scale.shape)}")


def dequantize_weight(codes: Tensor, scale: Tensor, *, transposed: bool = False) -> Tensor:
    """The dequantized weight, `code * scale` in fp32, in the shape of the codes.

    Args:
        codes: E4M3, `(out, in)`, or `(in, out)` if `transposed`.
        scale: `()`, `(1,)` or `(out, 1)`.
        transposed: whether outputs are along the second axis.
    """
    return codes.float() * (scale.reshape(1, -1) if transposed and scale.ndim == 2 else scale).float()


def quantize_weight(weight: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest E4M3 codes, with one scale per output row that maps the row's amax to 448.

    The scale is computed in fp64 and rounded to fp32, and the weight is divided in fp32 by the rounded scale, which is
    the one that is stored. The scale of a row of zeros is a tiny positive number.

    Args:
        weight: finite, any floating-point dtype, `(out, in)`, or `(in, out)` if `transposed`.
        transposed: whether outputs are along the second axis.

    Returns:
        Codes, float8_e4m3fn in the shape of `weight`, and the positive scale, fp32 `(out, 1)`.
    """
    values = weight.float()
    axis = 0 if transposed else 1
    # abs() would make another fp32 copy of the weight, and torch's aminmax() along an axis is six times slower.
    amax = torch.maximum(values.amin(dim=axis, keepdim=True).neg(), values.amax(dim=axis, keepdim=True))
    scale = amax_scale(amax, E4M3)
    return E4M3.cast(values / scale), scale.reshape(-1, 1).contiguous()


def to_bf16(values: Tensor) -> Tensor:
    """Round a tensor to bf16 (to nearest, ties to even); a bf16 tensor is returned itself, not a copy."""
    return values.to(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and all bits of two tensors are equal; -0 differs from 0, and a NaN equals the same NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference divided by that of `reference` (not divided if it is zero), computed in fp32."""
    norm = float(torch.linalg.vector_norm(reference.float()))
    error = float(torch.linalg.vector_norm(approximation.float() - reference.float()))
    return error / norm if norm > 0.0 else error
