"""Runs a quantized model in exact arithmetic, whose result does not depend on engine, thread count or processor.

A quantized transformer amplifies rounding errors. If sums are rounded at every addition, the order of the additions
affects their last bits. A different last bit can change a code, and a few layers later the logits differ by several
percent. This happens between two correct engines, and within one engine between two thread counts, so that results
cannot be compared bit for bit. Here, the arithmetic is defined such that they can:

* matrix multiplications of codes are exact in integers, followed by one fp32 multiplication by `scale_x * scale_w`;
* everything between a matrix multiplication and the next quantizer is float64, and rounded to fp32 only once, by the
  quantizer.

The remaining difference between two implementations is a relative error of at most 1e-15. It changes a code only if a
value is that close to a rounding boundary of fp32 that is also a boundary between two codes, which happened for none of
millions of codes. The codes and logits of a whole model are therefore bitwise equal and can be compared without a
tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.architecture import build
from fp8pipe.models.vision.attention import intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit, of_type
from fp8pipe.models.vision.structure import LinearSite
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

# fp32 represents every integer up to 2^24, so sums of integers that stay below it are exact in any order.
_FP32_INTEGERS: Final = 2**24
Codes = Callable[[str, Tensor], None]


def inexact_sites(quantized: QuantizedVit) -> list[str]:
    """Names of the matrix multiplications that do not have integer codes on both sides.

    Their results depend on the order of summation, so that the model cannot be run in exact arithmetic.
    """
    integers = {site for site, q in quantized.activations.items() if q.kind is Kind.INT}
    whole = {name for name, weight in quantized.weights.items() if weight.kind is Kind.INT}
    structure = quantized.structure
    linears = [s.name for s in structure.linears if s.name not in whole or f"{s.input_group}.input" not in integers]
    operands = {s.name: {f"{s.name}.{what}" for what in ("q", "k", "probs", "v")} for s in structure.attentions}
    return linears + [name for name, sites in operands.items() if not sites <= integers]


def double_model(quantized: QuantizedVit) -> nn.Module:
    """A new copy of the prepared model in float64, with dequantized weights and without quantization hooks.

    Epsilons of normalization layers are rounded to fp32, the precision in which ONNX stores them.
    """
    model = build(quantized.architecture)
    model.load_state_dict(quantized.model.state_dict())
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = as_fp32(module.eps)  # type: ignore[assignment, arg-type]
    return model.double()


class ExactVit:
    """A quantized model that runs in exact arithmetic; somewhat slower than `QuantizedVit`.

    Args:
        quantized: the quantized model, which is not changed.

    Raises:
        ConfigurationError: a matrix multiplication does not have integer codes on both sides, as in FP8 artifacts.
    """

    def __init__(self, quantized: QuantizedVit) -> None:
        inexact = inexact_sites(quantized)
        if inexact:
            raise ConfigurationError(
                f"{len(inexact)} product(s) have no exact result; the first: {inexact[0]}",
                why="only integer codes on both sides can be summed without rounding",
                fix="quantize with --bits wXaY for integers",
            )
        self.quantized = quantized
        self._model = double_model(quantized)
        self._weights = of_type(quantized.weights, WeightCodes)
        self._activations = of_type(quantized.activations, ActivationQuantizer)
        self._on_codes: Codes | None = None
        for site in quantized.structure.linears:
            layer = self._model.get_submodule(site.name)
            layer.forward = self._linear(site, layer)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, on_codes: Codes | None = None) -> Tensor:
        """Compute the logits (or the features of a backbone).

        Args:
            pixels: normalized images, `(N, 3, H, W)` fp32.
            on_codes: called with the name and the int8 codes of every activation site, in execution order.

        Returns:
            `(N, C)` fp32.
        """
        self._on_codes = on_codes
        try:
            with intercept_attention(self._model, self.quantized.structure.attention_names, self._attend):
                return vision_outputs(self._model, pixels.double()).float()
        finally:
            self._on_codes = None

    def _codes(self, site: str, x: Tensor) -> tuple[Tensor, ActivationQuantizer]:
        quantizer = self._activations[site]
        codes = quantizer.codes(x.float())  # the only place where activations are rounded to fp32
        if self._on_codes is not None:
            self._on_codes(site, codes)
        return codes, quantizer

    def _linear(self, site: LinearSite, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        weight = self._weights[site.name]

        def forward(x: Tensor) -> Tensor:
            codes, quantizer = self._codes(f"{site.input_group}.input", x)
            output = _product(codes, weight, quantizer, layer)
            if not site.bias:
                return output
            bias = layer.get_parameter("bias")
            return output + (bias.view(-1, 1, 1) if site.kind == "patch" else bias)

        return forward

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        q_codes, q_grid = self._codes(f"{name}.q", q * as_fp32(scale))
        k_codes, k_grid = self._codes(f"{name}.k", k)
        v_codes, v_grid = self._codes(f"{name}.v", v)
        logits = _scaled(_sum(q_codes, k_codes.transpose(-2, -1)), _joint(q_grid, k_grid))
        probs = (logits if mask is None else logits + mask).softmax(-1)
        p_codes, p_grid = self._codes(f"{name}.probs", probs)
        return _scaled(_sum(p_codes, v_codes), _joint(p_grid, v_grid))


def _product(codes: Tensor, weight: WeightCodes, reads: ActivationQuantizer, layer: nn.Module) -> Tensor:
    """Result of a linear layer or a patch embedding without its bias, in float64.

    Args:
        codes: int8 codes of the input.
        weight: codes and scales of the weight.
        reads: the quantizer of the input.
        layer: the module, for the kernel size and stride of a patch embedding.
    """
    flat = weight.codes.flatten(1)
    scale = torch.tensor(reads.scale) * weight.scale  # in fp32, like the product of scales in engines
    if weight.codes.dim() == 2:
        return _scaled(_sum(codes, flat.T), scale)
    assert isinstance(layer, nn.Conv2d)
    height, width = (size // step for size, step in zip(codes.shape[2:], layer.stride, strict=True))
    patches = functional.unfold(codes.float(), layer.kernel_size, stride=layer.stride)  # (N, in, P)
    output = _scaled(_sum(patches.transpose(1, 2).to(torch.int8), flat.T), scale)  # (N, P, out)
    return output.transpose(1, 2).reshape(len(output), -1, height, width)


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """The exact matrix product of two int8 tensors; in fp32 if all partial sums are exact there, else in float64."""
    bound = int(left.int().abs().max()) * int(right.int().abs().max()) * left.shape[-1]
    dtype = torch.float32 if bound <= _FP32_INTEGERS else torch.float64
    return left.to(dtype) @ right.to(dtype)


def _scaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Integer sums, converted to fp32, times an fp32 scale; the fp32 result is returned as float64."""
    return (sums.float() * scale).double()


def _joint(left: ActivationQuantizer, right: ActivationQuantizer) -> Tensor:
    return torch.tensor(left.scale) * torch.tensor(right.scale)


def as_fp32(value: float) -> float:
    """A number rounded to fp32, as an ONNX graph stores it."""
    return float(torch.tensor(value, dtype=torch.float32))
