"""The FP8 formats, rounding to them, and scales: so that training, export and every test speak of the same codes.

Casts saturate before rounding. Whether a framework's own FP8 cast saturates depends on its version and device
(torch 2.13 on a CPU saturates E4M3 and sends E5M2 overflow to infinity), so the clamp is always ours.
Formats: OCP 8-bit floating point specification, revision 1.0 (E4M3 here is the "FN" variant: no infinity).

Scales have one direction, `dequantized = code * scale`. A reciprocal scale loads without error and serves garbage, so
no function takes or gives one. How they follow from the largest magnitude:

* `power-of-two`: the smallest power of two under which the largest magnitude fits the grid. E4M3 is a floating format,
  so relative precision is untouched (at most one of 18 binades of range is spent), while scaling becomes exact: a
  dequantized code is exactly a bf16 number, and dividing by the scale is multiplying by its reciprocal.
* `exact`: FALQON's own. Its code multiplies by `max / amax`, rounded to fp32 once, and divides by the same number. Only
  what is stored in the end is a scale of our direction, so this rule alone keeps that multiplier.

Weights: `channel_scale`, `dequantize_weight` and `quantize_weight` go between weights, E4M3 codes and the scales vLLM
reads. A fused layer of vLLM (q/k/v, gate/up) that finds one scale per tensor requantizes all of its parts to the
largest of them, which changes codes. A scalar repeated down the rows is read as one scale per channel and keeps every
code, so a per-tensor weight leaves here as per-channel with equal rows: the same numbers, bit for bit. A linear weight
is `(out, in)`; GPT-2's Conv1D stores `(in, out)` and is called transposed. Scales are `(out, 1)` in both cases, as vLLM
declares them.
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
    """An 8-bit floating-point format held in torch's own dtype."""

    name: str  # the format's usual name
    dtype: torch.dtype  # the torch dtype that stores one code per byte
    max: float  # largest finite magnitude
    min_normal: float  # smallest normal magnitude
    mantissa_bits: int  # explicit mantissa bits
    max_bits: int = field(init=False, repr=False)  # of `max` as an fp32 number

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bits", struct.unpack("<i", struct.pack("<f", self.max))[0])

    def cast(self, values: Tensor) -> Tensor:
        """Round values in code units (over their scale) to the grid: saturating, nearest, ties to even; NaN stays NaN.

        Of any shape. Pass fp32 or fp64: a bf16 quotient has been rounded once already.
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


_EXPONENT = 0xFF << 23  # the bits of a float that hold its exponent
_ONE_AND_LESS_THAN_A_BINADE = (127 << 23) + (1 << 23) - 1

_BLOCK_VALUES = 1 << 24  # 64 MB in fp32

# Below this an amax counts as zero; the scale stays a normal number (torchao uses the same floor).
AMAX_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class Scale:
    """`dequantized = code * value`."""

    value: Tensor  # fp32, a scalar or `(rows, 1)`
    inverse_scale: Tensor | None = None  # what the rule `exact` multiplies by before rounding; None for powers of two
    columns: Tensor | None = None  # a scalar value repeated, `(columns,)`, for products that want one per column
    one: Tensor | None = None  # 1, a scalar, for products that want a scale where there is none

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
    # Of positive floats the bits are ordered, and 2^23 of them make a binade: so amax / max, rounded up to a power of
    # two, is a difference of bits rounded up to whole binades. No step is inexact, and few are needed on a GPU.
    bits = amax.clamp(min=AMAX_FLOOR).view(torch.int32)
    scale = (bits + (_ONE_AND_LESS_THAN_A_BINADE - grid.max_bits) & _EXPONENT).view(torch.float32)
    return torch.add(scale, amax, alpha=0)  # infinity times 0 is NaN


def quantize(x: Tensor, grid: FloatGrid, rule: ScaleRule, *, per_row: bool = False) -> tuple[Tensor, Scale]:
    """Round `x` `(rows, cols)` to a grid, with one scale or one scale per row: contiguous codes, and the scale."""
    scale = amax_to_scale((x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()).float(), grid, rule)
    return scale.quantize(x, grid).contiguous(), scale


def amax_to_scale(amax: Tensor, grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The scale that `rule` has for largest magnitudes `amax` (fp32, a scalar or `(rows, 1)`)."""
    if rule is ScaleRule.EXACT:
        return Scale.exact((grid.max / amax.double().clamp(min=AMAX_FLOOR)).float())
    return Scale(power_of_two_scale(amax, grid))


def quantize_stacked(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> tuple[Tensor, Scale]:
    """`quantize` of stacked matrices `(rows, cols)`, with one scale; little but the codes is held beside them."""
    scale = stacked_scale(weights, grid, rule)
    rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    codes = torch.empty(rows, cols, dtype=grid.dtype, device=weights[0].device)
    start = 0
    for block in (block for weight in weights for block in row_blocks(weight)):
        codes[start : start + block.shape[0]] = scale.quantize(block, grid)
        start += block.shape[0]
    return codes, scale


def stacked_scale(weights: Sequence[Tensor], grid: FloatGrid, rule: ScaleRule) -> Scale:
    """The one scale of several matrices."""
    amax = torch.stack([block.abs().amax().float() for weight in weights for block in row_blocks(weight)]).amax()
    return amax_to_scale(amax, grid, rule)


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a matrix, whole rows each, of a size that temporaries may have."""
    blocks: tuple[Tensor, ...] = matrix.split(max(1, _BLOCK_VALUES // matrix.shape[1]))
    return blocks


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def channel_scale(scale: Tensor, rows: int) -> Tensor:
    """Repeat a per-tensor scale `()` or `(1,)` down the output rows; a per-row scale unchanged: fp32 `(rows, 1)`.

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
    """Round a weight to the nearest E4M3 code, each output row on its own scale (amax maps to 448).

    The scale's division runs in fp64 and is stored as fp32; codes come from an fp32 division by that stored
    scale, so that `code * scale` is what any reader gets. A row of zeros gets a tiny positive scale.

    Of a finite weight of any float dtype, `(out, in)`, or `(in, out)` when `transposed`: codes float8_e4m3fn of its
    shape, and the scale, fp32 `(out, 1)`, positive.
    """
    values = weight.float()
    axis = 0 if transposed else 1
    # No fp32 copy of the weight, unlike abs(); and torch's aminmax() along an axis takes six times as long.
    amax = torch.maximum(values.amin(dim=axis, keepdim=True).neg(), values.amax(dim=axis, keepdim=True))
    scale = amax_scale(amax, E4M3)
    return E4M3.cast(values / scale), scale.reshape(-1, 1).contiguous()


def to_bf16(values: Tensor) -> Tensor:
    """Round to bf16 once (nearest, ties to even); any shape, a new tensor unless already bf16."""
    return values.to(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are the same (so -0 differs from 0, and NaN equals NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of `reference` (0 when both are zero); norms in fp32."""
    norm = float(torch.linalg.vector_norm(reference.float()))
    error = float(torch.linalg.vector_norm(approximation.float() - reference.float()))
    return error / norm if norm > 0.0 else error
