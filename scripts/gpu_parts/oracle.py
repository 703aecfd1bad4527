"""The reference for FALQON layers: outputs and gradients in fp64 from the operands' codes, with error bounds.

The operands are quantized on the CPU; whether a GPU computes the same codes is checked separately. A correct
implementation may then differ only in its summation order and in roundings to bf16, so each output has an error bound:

* A sum of n products in fp32 has an error of at most n 2^-23 times the sum of their magnitudes, in any rounding mode.
* FP8 tensor cores of Hopper keep about 14 bits: they align 32 products and the accumulator to the largest of them and
  truncate (DeepSeek-V3 technical report, section 3.3.2); other GPUs keep more. For each such addition, the bound allows
  2^-13 of the sum of all magnitudes. In theory, truncation could lose more, if most of the 32 products were just too
  small to be kept; with noise-like operands it loses a small part of that.
* Each rounding to bf16, which has 8 significant bits, has an error of at most 2^-8 of the value.
* Second-order errors, and the application of scales in fp32, are small in comparison: all bounds are widened by 1 %.

The bound of a long sum is wide, since it covers the worst case. It detects a wrong scale, row or operand, but not a
lost bit. Therefore the root mean square error is recorded, too, which shows by how much two implementations differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear

_BF16: Final = 2.0**-8
_SECOND_ORDER: Final = 1.01


@dataclass(frozen=True, slots=True)
class Expected:
    """The exact value of an output and its error bound; both fp64, with the output's shape."""

    value: Tensor
    bound: Tensor

    def compare(self, found: Tensor) -> dict[str, float]:
        """Compare an output with the exact value.

        Returns:
            `of_bound`: the largest error relative to its bound (1 is the limit); `rms`: the root mean square error
            relative to the root mean square of the exact value.
        """
        error = (found.double().cpu() - self.value).abs()
        worst = (error / (_SECOND_ORDER * self.bound).clamp(min=1e-300)).max()
        return {"of_bound": float(worst), "rms": float(error.square().mean().sqrt() / _rms(self.value))}


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt().clamp(min=1e-300)


def share(count: int, fp8_cores: bool) -> float:
    """Error bound of a sum of `count` products, relative to the sum of their magnitudes."""
    return (-(-count // 32) + 1) * 2.0**-13 if fp8_cores else count * 2.0**-23


def rounded(x: Tensor, grid: FloatGrid, rule: ScaleRule) -> Tensor:
    """`x` `(tokens, width)` as it enters a layer's GEMM: quantized to `grid` and decoded to fp64.

    There is one scale per row for power-of-two scales, else one scale for the tensor.
    """
    codes, scale = quantize(x, grid, rule, per_row=rule is ScaleRule.POWER_OF_TWO)
    return decoded(codes, scale)


def decoded(codes: Tensor, scale: Scale) -> Tensor:
    """Decode codes with their scale; returns fp64."""
    wide = codes.double()
    return wide * scale.value.double() if scale.inverse_scale is None else wide / scale.inverse_scale.double()


def expected(layer: FalqonLinear, x: Tensor, grad: Tensor, fp8_cores: bool) -> dict[str, Expected]:
    """The expected output `y` and gradients `dx` and `db` of a layer, and `da` if it trains A.

    Args:
        layer: a layer without bias, on the CPU.
        x: input, `(tokens, in)` bf16, on the CPU.
        grad: gradient of the output, `(tokens, out)` bf16, on the CPU.
        fp8_cores: whether the bounds must allow for accumulation in FP8 tensor cores.
    """
    rule = layer.code_scale.rule
    w, a = (decoded(codes, layer.code_scale) for codes in (layer.weight_codes, layer.adapter_codes))
    b = layer.lora_B.detach().bfloat16().double()
    read, back = rounded(x, E4M3, rule), rounded(grad, E5M2, rule)
    into, out = share(layer.in_features, fp8_cores), share(layer.out_features, fp8_cores)
    o, y = read @ a.t(), read @ w.t()
    o_bound = into * read.abs() @ a.abs().t() + _BF16 * o.abs()
    y_bound = into * read.abs() @ w.abs().t() + _BF16 * y.abs()
    dx, dx_bound = back @ w, out * back.abs() @ w.abs()
    found: dict[str, Expected] = {}
    if layer.live:
        thin = share(layer.rank, False)
        y_bound += (o_bound + thin * o.abs()) @ b.abs().t() + _BF16 * (o @ b.t()).abs()
        y = y + o @ b.t()
        beside = grad.double() @ b
        beside_bound = share(layer.out_features, False) * grad.double().abs() @ b.abs() + _BF16 * beside.abs()
        # A CPU adds these terms to the same sum, a GPU computes a separate sum: the bound covers both.
        dx_bound += (beside_bound + out * beside.abs()) @ a.abs() + _BF16 * dx.abs()
        dx = dx + beside @ a
        if layer.lora_A is not None:
            da = beside.t() @ read
            da_bound = (beside_bound + share(len(grad), False) * beside.abs()).t() @ read.abs() + _BF16 * da.abs()
            found["da"] = Expected(da, da_bound)
    y_bound += _BF16 * y.abs()
    dx_bound += _BF16 * dx.abs()
    found |= {"y": Expected(y, y_bound), "dx": Expected(dx, dx_bound)}
    return found | {"db": _adapter(rule, grad, back, o, o_bound)}


def _adapter(rule: ScaleRule, grad: Tensor, back: Tensor, o: Tensor, o_bound: Tensor) -> Expected:
    """The expected dB = G^T O: G and O in bf16, or with exact scales quantized to E5M2 and E4M3, one scale each."""
    if rule is ScaleRule.EXACT:
        # O is quantized after it was computed with an error, so its code may be off by a whole step: 2^-3 of the value,
        # or, for subnormal codes, 2^-9 / 448 of the largest value.
        left, o_bound = back, o_bound + 2.0**-3 * o.abs() + o.abs().max() * 2.0**-9 / 448
    else:
        left = grad.double()
    db = left.t() @ o
    bound = left.abs().t() @ (o_bound + share(len(grad), False) * o.abs()) + _BF16 * db.abs()
    return Expected(db, bound)
