"""Linear layers as vLLM holds them where kernels multiply FP8 codes, without vLLM: its attributes, kernels in torch.

Faults can be put into a kernel. Weights lie as `(in, out)`, views of the checkpoint's, or packed as no byte tells.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedKernel", "ScaledKernel", "make_codes", "make_layer"]


def make_codes(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FP8 codes `(rows, columns)` and scales fp32 `(rows, 1)` of a random weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def make_layer(codes: Tensor, scale: Tensor, kernel: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A layer of these codes, after its kernel has processed them."""
    method = SimpleNamespace(apply=lambda layer, x, bias=None: layer.scheme.fp8_linear.apply_weights(layer, x, bias))
    layer = SimpleNamespace(
        weight=codes.t(), weight_scale=scale, bias=None, params_dtype=dtype, quant_method=method,
        input_size_per_partition=codes.shape[1], scheme=SimpleNamespace(fp8_linear=kernel),
    )  # fmt: skip
    kernel.process_weights_after_loading(layer)
    return layer


class ScaledKernel:
    """Rounds inputs, one scale per token, and multiplies codes; attributes are its faults."""

    off = 1.0  # factor of what it multiplies by
    reciprocal = False  # multiplies by the scale's reciprocal
    approximate = 1.0  # factor of its scale: a division that is off in the last bits
    truncates = False  # codes towards zero instead of the nearest
    rounds = True
    bits: int | None = None  # that are kept behind the leading one of the largest addend, as tensor cores do

    def process_weights_after_loading(self, layer: Any) -> None:
        """Codes stay as they lie."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.rounds:
            return (x.float() @ (layer.weight.float() * layer.weight_scale.t())).to(x.dtype)
        scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512)) * self.approximate
        quotients = x.float() * scale.reciprocal() if self.reciprocal else x.float() / scale
        codes = quotients.clamp(-448, 448).to(torch.float8_e4m3fn)
        if self.truncates:
            down = (codes.view(torch.uint8) - (codes.float().abs() > quotients.abs()).to(torch.uint8)).view(codes.dtype)
            codes = down
        return self.apply_scaled_mm(A=codes, B=layer.weight, As=scale, Bs=layer.weight_scale, out_dtype=x.dtype)

    def apply_scaled_mm(self, *, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor, out_dtype: torch.dtype) -> Tensor:
        sums = A.float() @ B.float() if self.bits is None else _aligned(A.float(), B.float(), self.bits)
        return (sums * As * Bs.t() * self.off).to(out_dtype)


class PackedKernel:
    """Packs codes into integers in an order of its own, and scales in its dtype; does not round inputs."""

    def process_weights_after_loading(self, layer: Any) -> None:
        self.order = torch.randperm(layer.weight.shape[0], generator=torch.Generator().manual_seed(1))
        layer.weight_scale = layer.weight_scale.to(layer.params_dtype).t().contiguous()
        layer.weight = layer.weight[self.order].contiguous().view(torch.int32)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = layer.weight.view(torch.float8_e4m3fn).float() * layer.weight_scale.float()
        product = x.float()[:, self.order] @ weight
        return (product if bias is None else product + bias.float()).to(x.dtype)


def _aligned(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """Sums whose addends are cut, 32 at a time, at `bits` behind the leading one of the largest of them."""
    total = torch.zeros(x.shape[0], weight.shape[1])
    for start in range(0, x.shape[1], 32):
        addends = torch.cat((x[:, start : start + 32, None] * weight[None, start : start + 32], total[:, None]), 1)
        step = torch.exp2(torch.floor(torch.log2(addends.abs().amax(1, keepdim=True).clamp(min=1e-30))) - bits)
        total = (torch.trunc(addends / step) * step).sum(1)
    return total
