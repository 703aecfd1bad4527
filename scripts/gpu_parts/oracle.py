"""What a FALQON layer must compute, in fp64 from its operands' codes, and how far from that fp32 sums and bf16 may be.

The operands are those that the CPU rounds; that a GPU rounds to the same codes is a check of its own. Then the only
freedom of a correct product is the order of its sum and the roundings to bf16 on the way, so each output has a bound:

* A sum of n products in fp32 errs by at most n 2^-23 times the sum of their magnitudes, whichever way it rounds.
* FP8 tensor cores of Hopper keep about 14 bits: they align 32 products and the sum so far to the largest of them and
  cut off the rest (DeepSeek-V3 technical report, section 3.3.2); other GPUs keep more. Each such addition is allowed
  2^-13 of the sum of all magnitudes. Cutting off could cost more in theory, were most of the 32 just too small to be
  kept; with operands that look like noise it costs a small part of that.
* Each rounding to bf16, which has 8 significant bits, errs by at most 2^-8 of its value.
* Errors of errors, and scales that are applied in fp32, are small beside these: all bounds are widened by 1 %.

The bound of a long sum is wide, since it holds for the worst case. It finds a wrong scale, row or operand, not a lost
bit. So the root of the mean squared error is recorded beside it: that is what two implementations differ by.
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
    """An exact value, and how far from it an output may be; both fp64 of the output's shape."""

    value: Tensor
    bound: Tensor

    def compare(self, found: Tensor) -> dict[str, float]:
        """`of_bound`, the largest error as a share of its bound (1 is the limit); `rms`, relative to the value's."""
        error = (found.double().cpu() - self.value).abs()
        worst = (error / (_SECOND_ORDER * self.bound).clamp(min=1e-300)).max()
        return {"of_bound": float(worst), "rms": float(error.square().mean().sqrt() / _rms(self.value))}


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt().clamp(min=1e-300)


def share(count: int, fp8_cores: bool) -> float:
    """Error of a sum of `count` products, relative to the sum of their magnitudes, at most."""
    return (-(-count // 32) + 1) * 2.0**-13 if fp8_cores else count * 2.0**-23


def rounded(x: Tensor, grid: FloatGrid, rule: ScaleRule) -> Tensor:
    """`x` (tokens, width) as the products of a layer read it: on the grid, one scale a row with powers of two; fp64."""
    codes, scale = quantize(x, grid, rule, per_row=rule is ScaleRule.POWER_OF_TWO)
    return decoded(codes, scale)


def decoded(codes: Tensor, scale: Scale) -> Tensor:
    """The values of codes, fp64."""
    wide = codes.double()
    return wide * scale.value.double() if scale.inverse_scale is None else wide / scale.inverse_scale.double()


def expected(layer: FalqonLinear, x: Tensor, grad: Tensor, fp8_cores: bool) -> dict[str, Expected]:
    """Output `y`, `dx` and `db` of a layer on the CPU.

    Args:
        layer: without bias, on the CPU.
        x: `(tokens, in)` bf16, on the CPU.
        grad: `(tokens, out)` bf16, of the output.
        fp8_cores: whether what is compared sums as the FP8 tensor cores of a GPU do.
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
    if layer.live:
        thin = share(layer.rank, False)
        y_bound += (o_bound + thin * o.abs()) @ b.abs().t() + _BF16 * (o @ b.t()).abs()
        y = y + o @ b.t()
        beside = grad.double() @ b
        beside_bound = share(layer.out_features, False) * grad.double().abs() @ b.abs() + _BF16 * beside.abs()
        # On a CPU they are further terms of the same sum, on a GPU a sum of their own.
        dx_bound += (beside_bound + out * beside.abs()) @ a.abs() + _BF16 * dx.abs()
        dx = dx + beside @ a
    y_bound += _BF16 * y.abs()
    dx_bound += _BF16 * dx.abs()
    return {"y": Expected(y, y_bound), "dx": Expected(dx, dx_bound), "db": _adapter(rule, grad, back, o, o_bound)}


def _adapter(rule: ScaleRule, grad: Tensor, back: Tensor, o: Tensor, o_bound: Tensor) -> Expected:
    """dB = G^T O: in bf16, or of casts of both (E5M2 and E4M3, one scale each) with exact scales."""
    if rule is ScaleRule.EXACT:
        # O is rounded to its grid after its own error, so it may be a whole step of 2^-3 away; below the normal numbers
        # steps are 2^-9 of 448 in the largest value's units.
        left, o_bound = back, o_bound + 2.0**-3 * o.abs() + o.abs().max() * 2.0**-9 / 448
    else:
        left = grad.double()
    db = left.t() @ o
    bound = left.abs().t() @ (o_bound + share(len(grad), False) * o.abs()) + _BF16 * db.abs()
    return Expected(db, bound)
