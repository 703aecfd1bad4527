"""The number formats of quantized vision transformers, which integer and FP8 runtimes reproduce exactly.

Integer codes of every bit width and for every engine are `code = clamp(round(x / scale), low, high)`; the real value 0
has the code 0. Values are divided by the scale, never multiplied by its reciprocal, and ties are rounded to even. The
results are bitwise those of ONNX's QuantizeLinear.

Asymmetric ranges are expressed by `low` and `high`: `low = -z, high = 2^k - 1 - z` has the levels of a k-bit format
with zero point z, but is stored as INT8 with zero point 0, as TensorRT requires. A non-negative range (probabilities)
has `low = 0`. With 8 bits, INT8 can only represent symmetric ranges and 0..127.

`compensated_round` rounds a weight column by column, to any number format, and distributes the rounding error of each
column over the columns that are not rounded yet. This is the solver of GPTQ (arXiv 2210.17323, algorithm 1): the update
of Optimal Brain Surgeon with the second moments H = X^T X of the layer's inputs, applied in blocks of columns. It makes
the error of the layer's output, `|| X (Q - W)^T ||`, small, although `|| Q - W ||` is not. Columns are processed in
descending order of the diagonal of H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind

INT8_MIN: Final = -128
INT8_MAX: Final = 127
# This number is subnormal in FP16 and has 6 mantissa bits, so rounding to FP16 changes a scale by less than 1 percent.
SMALLEST_SCALE: Final = 2.0**-18
_LARGEST_SCALE: Final = 65504.0


def nearest_codes(units: Tensor, low: int, high: int) -> Tensor:
    """Round values that were divided by their scale to the nearest code from `low` to `high`, ties to even.

    The codes are returned in the dtype of `units`.
    """
    return torch.round(units).clamp_(low, high)


def storable_scale(scale: Tensor) -> Tensor:
    """The nearest scale that FP16 represents exactly, and that is at least 2^-18; fp32.

    Engines that compute in half precision need FP16 scales. They are rounded before training, because a scale that is
    rounded only at export would differ from the one used in training.
    """
    return scale.float().clamp(SMALLEST_SCALE, _LARGEST_SCALE).half().float()


@dataclass(frozen=True, slots=True)
class ActivationQuantizer:
    """Quantizes activations with one fixed scale per tensor.

    Raises:
        ValueError: the scale is not a positive fp32 number, or the bounds do not fit INT8.
    """

    scale: float  # positive, exactly an fp32 number; `value = code * scale`
    low: int = INT8_MIN  # smallest code, -128 to 0 (integer codes)
    high: int = INT8_MAX  # largest code, 0 to 127 (integer codes)
    kind: Kind = Kind.INT  # integer codes, or E4M3, whose own range replaces `low` and `high`

    def __post_init__(self) -> None:
        as_fp32 = torch.tensor(self.scale, dtype=torch.float32)
        if not (torch.isfinite(as_fp32) and as_fp32 > 0 and float(as_fp32) == self.scale):
            raise ValueError(f"a scale must be a positive fp32 number, got {self.scale!r}")
        if not INT8_MIN <= self.low <= 0 <= self.high <= INT8_MAX or self.low == self.high:
            raise ValueError(f"codes {self.low}..{self.high} do not fit INT8 around zero")

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 254 if self.kind is Kind.E4M3 else self.high - self.low + 1

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x` (any shape), computed in fp32: int8, or float8_e4m3fn for E4M3."""
        units = x.float() / self._scale_on(x)
        if self.kind is Kind.E4M3:
            return E4M3.cast(units)
        return nearest_codes(units, self.low, self.high).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """`code * scale`, fp32."""
        return codes.float() * self._scale_on(codes)

    def fake(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`: `dequantize(codes(x))` in fp32; no gradient passes through the rounding."""
        scale = self._scale_on(x)
        if self.kind is Kind.E4M3:
            return E4M3.cast(x.float() / scale).float().mul_(scale)
        return nearest_codes(x.float() / scale, self.low, self.high).mul_(scale)

    def _scale_on(self, x: Tensor) -> Tensor:
        """The scale as a tensor created on the device of `x`; a copy from the host would synchronize with the GPU."""
        return torch.full((), self.scale, dtype=torch.float32, device=x.device)


@dataclass(frozen=True, slots=True)
class WeightCodes:
    """The codes of one weight, with one scale per output channel."""

    codes: Tensor  # int8 or float8_e4m3fn, in the weight's own shape, output channels first
    scale: Tensor  # `(out,)` fp32, positive; `weight = code * scale`
    bits: int  # width of integer codes; 8 for E4M3

    @property
    def kind(self) -> Kind:
        """The number format, derived from the dtype of the codes."""
        return Kind.INT if self.codes.dtype == torch.int8 else Kind.E4M3

    def dequantize(self) -> Tensor:
        """`code * scale`, fp32, in the weight's shape."""
        return self.codes.float() * _per_channel(self.scale, self.codes)

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bits: int, kind: Kind = Kind.INT) -> WeightCodes:
        """Round a weight to the nearest codes.

        Args:
            weight: `(out, ...)`, any floating-point dtype.
            scale: positive fp32 scales, `(out,)`.
            bits: width of integer codes; ignored for E4M3.
            kind: the number format, integer or E4M3.
        """
        units = weight.float() / _per_channel(scale, weight)
        if kind is Kind.E4M3:
            return cls(E4M3.cast(units), scale.float(), 8)
        return cls(nearest_codes(units, *weight_limits(bits)).to(torch.int8), scale.float(), bits)


def weight_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer code of a weight: the range of two's complement, but without -128 for 8 bits.

    Some engines do not accept -128.
    """
    half = 2 ** (bits - 1)
    return max(-half, -INT8_MAX), half - 1


def _per_channel(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (like.dim() - 1))


class Compensated(NamedTuple):
    """The result of `compensated_round`, `(out, in)` fp32.

    `before` contains each weight as it was just before it was rounded, that is, with the compensation of the errors of
    columns rounded earlier; `rounded` contains the rounded weights.
    """

    before: Tensor
    rounded: Tensor


def compensated_round(
    weight: Tensor,
    moments: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    block: int,
    damping: float,
    damping_floor: float = 0.0,
    fused: bool = True,
) -> Compensated:
    """Round `weight` so that the error of `X weight^T` is small for inputs X with second moments `moments`.

    Args:
        weight: `(out, in)`, any floating-point dtype; not modified.
        moments: H, `(in, in)` fp32: X^T X up to a constant factor.
        round_column: rounds the values of one column, `(out,)` fp32; called with the values and the column's index.
        block: number of columns in a block; the columns after a block are updated once per block, with one GEMM.
        damping: number added to the diagonal of H, as a fraction of the diagonal's mean.
        damping_floor: another number added to the diagonal of H.
        fused: multiply and subtract in one operation; if False, the product is rounded before it is subtracted.
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order], damping, damping_floor)
    work = weight.detach().float().t()[order].contiguous()  # (in, out), so that the weights of an input are contiguous
    rounded = torch.empty_like(work)
    for start in range(0, work.shape[0], block):
        stop = min(start + block, work.shape[0])
        columns, local, rest = work[start:stop], factor[start:stop, start:stop], factor[start:stop, stop:]
        errors = torch.empty_like(columns)
        for i, place in enumerate(order[start:stop].tolist()):
            rounded[start + i] = round_column(columns[i], place)
            torch.div(columns[i] - rounded[start + i], local[i, i], out=errors[i])
            if fused:
                columns[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
            else:
                columns[i + 1 :] -= torch.outer(local[i, i + 1 :], errors[i])
        if fused:
            work[stop:].addmm_(rest.t(), errors, alpha=-1.0)
        else:
            work[stop:] -= (errors.t().contiguous() @ rest).t()
    back = torch.argsort(order)
    return Compensated(work[back].t().contiguous(), rounded[back].t().contiguous())


def inverse_factor(moments: Tensor, damping: float, floor: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments, `(in, in)` fp32 (computed in fp64)."""
    work = moments.double()
    mean = work.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    work.diagonal().add_(damping * mean + floor)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(work))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
