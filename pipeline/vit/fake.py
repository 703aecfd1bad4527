"""Rounding with gradients: the grids of a deployed model, made trainable.

Forward is exactly the deployed formula, so a student in evaluation computes what it will be deployed as. Backward
passes the gradient straight through the rounding where the value lies inside the range, and gives each step the
gradient of LSQ (arXiv 1902.08153, equation 3): `code - x/s` inside, the clipping code outside. Steps are trained as
logarithms, so none can become zero or negative, and one learning rate fits steps of every size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind


class _Fake(torch.autograd.Function):
    """`clamp(round(x / s), low, high) * s`; s is a scalar, or broadcasts over output channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        units = x / step
        codes = torch.round(units)
        ctx.save_for_backward(units, step)
        ctx.limits = low, high
        return codes.clamp_(low, high).mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (units, step), (low, high), (grad,) = ctx.saved_tensors, ctx.limits, grads
        # Inside the range: up to half a step beyond the outermost codes, which still round to them. The kernel of
        # hardtanh passes such gradients in one sweep, where a mask takes five.
        through = torch.ops.aten.hardtanh_backward(grad, units, low - 0.5, high + 0.5)
        slope = torch.round(units).clamp_(low, high).mul_(grad).addcmul_(units, through, value=-1)
        dims = [d for d in range(step.dim()) if step.shape[d] == 1] if step.dim() else None
        d_step = slope.sum() if dims is None else slope.sum(dims, keepdim=True)
        return through, d_step, None, None


class _FakeE4M3(torch.autograd.Function):
    """`E4M3(x / s) * s`: relative precision is the same for every s, so only saturation moves the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        units = x / step
        ctx.save_for_backward(units.abs() <= E4M3.max, step)
        return E4M3.cast(units).float().mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        inside, _ = ctx.saved_tensors
        return grads[0] * inside, None


def fake_quantize(x: Tensor, step: Tensor, low: int, high: int, kind: Kind = Kind.INT) -> Tensor:
    """`x` on its grid, with gradients for `x` and `step`.

    Args:
        x: fp32, any shape.
        step: positive fp32, scalar or with x's number of dimensions and size 1 except along output channels.
        low: smallest integer code.
        high: largest integer code.
        kind: integer codes or E4M3 (whose step gets no gradient).

    Returns:
        fp32, shape of `x`; bit for bit what the deployed quantizer of this step computes.
    """
    if kind is Kind.E4M3:
        return _FakeE4M3.apply(x.float(), step.detach())
    return _Fake.apply(x.float(), step, low, high)
