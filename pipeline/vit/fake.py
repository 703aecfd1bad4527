"""Rounding with gradients: the grids of a deployed model, made trainable.

Forward is exactly the deployed formula, so a student in evaluation computes what it will be deployed as. Backward
passes the gradient straight through the rounding where the value lies inside the range, and gives each step the
gradient of LSQ (arXiv 1902.08153, equation 3): `code - x/s` inside, the clipping code outside. Steps are trained as
logarithms, so none can become zero or negative, and one learning rate fits steps of every size.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import block_units, e2m1_round
from fp8pipe.numerics.quantizers import nearest_codes

# Half a step beyond the largest code still rounds to it: the last step, from 4 to 6, is 2.
_INSIDE_E2M1: Final = 7.0


class _Fake(torch.autograd.Function):
    """`clamp(round(x / s), low, high) * s`; s is a scalar, or broadcasts over output channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        units = x / step
        ctx.save_for_backward(units, step)
        ctx.limits = low, high
        return nearest_codes(units, low, high).mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (units, step), (low, high), (grad,) = ctx.saved_tensors, ctx.limits, grads
        # Inside the range: up to half a step beyond the outermost codes, which still round to them. The kernel of
        # hardtanh passes such gradients in one sweep, where a mask takes five.
        through = torch.ops.aten.hardtanh_backward(grad, units, low - 0.5, high + 0.5)
        slope = nearest_codes(units, low, high).mul_(grad).addcmul_(units, through, value=-1)
        dims = [d for d in range(step.dim()) if step.shape[d] == 1] if step.dim() else None
        d_step = slope.sum() if dims is None else slope.sum(dims, keepdim=True)
        return through, d_step, None, None


class _StraightThrough(torch.autograd.Function):
    """`rounded` in the place of `x`, with `x`'s gradient where it lies inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


def fake_quantize(x: Tensor, step: Tensor, low: int, high: int, kind: Kind = Kind.INT) -> Tensor:
    """`x` on its grid, with gradients for `x` and `step`.

    Args:
        x: fp32, any shape.
        step: positive fp32, scalar or with x's number of dimensions and size 1 except along output channels.
        low: smallest integer code.
        high: largest integer code.
        kind: integer codes, or E4M3, whose step gets no gradient: relative precision is the same for every step.

    Returns:
        fp32, shape of `x`; bit for bit what the deployed quantizer of this step computes.
    """
    if kind is Kind.E4M3:
        return _fake_e4m3(x.float(), step)
    return cast("Tensor", _Fake.apply(x.float(), step, low, high))  # type: ignore[no-untyped-call]


def _fake_e4m3(x: Tensor, step: Tensor) -> Tensor:
    with torch.no_grad():
        units = x / step
        rounded, inside = E4M3.cast(units).float().mul_(step), units.abs() <= E4M3.max
    return cast("Tensor", _StraightThrough.apply(x, rounded, inside))  # type: ignore[no-untyped-call]


def fake_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """`x` on the NVFP4 grid of its blocks, with a gradient for `x`.

    Args:
        x: `(..., n)`, n a multiple of 16.
        scale: `(..., n / 16)` fp32, `block_scale * tensor_scale`.

    Returns:
        fp32, shape of `x`; bit for bit what is deployed.
    """
    x = x.float()
    with torch.no_grad():
        units = block_units(x, scale)
        rounded, inside = e2m1_round(units).mul_(scale.unsqueeze(-1)), units.abs() <= _INSIDE_E2M1
    return cast("Tensor", _StraightThrough.apply(x, rounded.flatten(-2), inside.flatten(-2)))  # type: ignore[no-untyped-call]
