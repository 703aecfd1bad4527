"""NVFP4 with gradients: the deployed rounding forward, straight through it backward.

Block scales of weights stay those of the start: distillation moves a weight by a fraction of a code step, and a scale
that moved would take sixteen codes along. Those of activations follow the activation.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8pipe.numerics.nvfp4 import BLOCK, BlockQuantizer, BlockScales, e2m1_round

# Half a step beyond the largest code still rounds to it: the last step, from 4 to 6, is 2.
_INSIDE: Final = 7.0


class _FakeBlocks(torch.autograd.Function):
    """`E2M1(x / s) * s` in blocks of 16, s `(..., n / 16)`; zero where s is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.unsqueeze(-1)
        units = x.unflatten(-1, (-1, BLOCK)) / torch.where(scale > 0, scale, torch.inf)
        ctx.save_for_backward(units.abs() <= _INSIDE)
        return e2m1_round(units).mul_(scale).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside.flatten(-2), None


def fake_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """`x` on the NVFP4 grid of its blocks, with a gradient for `x`.

    Args:
        x: `(..., n)`, n a multiple of 16.
        scale: `(..., n / 16)` fp32, `block_scale * tensor_scale`.

    Returns:
        fp32, shape of `x`; bit for bit what is deployed.
    """
    return _FakeBlocks.apply(x.float(), scale)


class RoundedBlockWeight(nn.Module):
    """Parametrization of a weight `(out, in)` in NVFP4, with the scales it was given."""

    def __init__(self, scales: BlockScales) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid."""
        return fake_blocks(weight, self.scales.product)

    def mean_step(self) -> Tensor:
        """The mean distance of neighbouring codes up to 6, a scalar: 12 / 14 of the scale."""
        return self.scales.product.mean() * (12.0 / 14.0)


class RoundedBlockActivation(nn.Module):
    """A site in NVFP4."""

    def __init__(self, quantizer: BlockQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid that it makes for itself."""
        with torch.no_grad():
            scale = self.quantizer.block_scales(x).float() * self.quantizer.tensor_scale
        return fake_blocks(x, scale)

    def frozen(self) -> BlockQuantizer:
        """The deployed quantizer."""
        return self.quantizer
