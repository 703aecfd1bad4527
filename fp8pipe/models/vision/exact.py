"""The quantized model in arithmetic with a single possible result, equal for every engine, thread count and processor.

A quantized transformer amplifies rounding errors. If sums are rounded at every addition, the order of additions affects
the last bits, a last bit changes a code, and a few layers later the logits differ by several percent, whether between
two correct engines or in one engine with two thread counts. Bitwise comparison is then impossible. It becomes possible
if the arithmetic leaves no freedom, as here:

* matrix multiplications of codes are exact in integers, and one fp32 multiplication by `scale_x * scale_w` scales them;
* everything between a matrix multiplication and the next quantizer is float64, rounded to fp32 once, when quantized.

Two implementations then differ by a relative error of at most 1e-15. That changes a code only if a value lies this
close to the boundary of two fp32 numbers that is also the boundary of two codes, which happened for none of millions of
codes. Codes and logits of a whole model are therefore bitwise equal, and a comparison needs no tolerance.
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

# Up to 2^24 fp32 represents every integer, so sums of integers below it are exact in any order.
_FP32_INTEGERS: Final = 2**24
Codes = Callable[[str, Tensor], None]


def inexact_sites(quantized: QuantizedVit) -> list[str]:
    """Matrix multiplications whose result depends on summation order: those without integer codes on both sides."""
    integers = {site for site, q in quantized.activations.items() if q.kind is Kind.INT}
    whole = {name for name, weight in quantized.weights.items() if weight.kind is Kind.INT}
    structure = quantized.structure
    linears = [s.name for s in structure.linears if s.name not in whole or f"{s.input_group}.input" not in integers]
    operands = {s.name: {f"{s.name}.{what}" for what in ("q", "k", "probs", "v")} for s in structure.attentions}
    return linears + [name for name, sites in operands.items() if not sites <= integers]


def double_model(quantized: QuantizedVit) -> nn.Module:
    """The prepared model in float64 with dequantized weights, without hooks.

    Epsilons of normalizations are rounded to fp32, the precision in which ONNX stores them.
    """
    model = build(quantized.architecture)
    model.load_state_dict(quantized.model.state_dict())
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = as_fp32(module.eps)  # type: ignore[assignment, arg-type]
    return model.double()


class ExactVit:
    """An artifact's model in exact arithmetic; somewhat slower than `QuantizedVit`.

    Args:
        quantized: the model; not changed.

    Raises:
        ConfigurationError: a matrix multiplication has no integer codes (FP8 artifacts).
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
        """Logits (or features) `(N, C)` fp32 of normalized pixels `(N, 3, H, W)` fp32.

        Args:
            pixels: the images.
            on_codes: called with the codes (int8) of every activation site, in execution order.
        """
        self._on_codes = on_codes
        try:
            with intercept_attention(self._model, self.quantized.structure.attention_names, self._attend):
                return vision_outputs(self._model, pixels.double()).float()
        finally:
            self._on_codes = None

    def _codes(self, site: str, x: Tensor) -> tuple[Tensor, ActivationQuantizer]:
        quantizer = self._activations[site]
        codes = quantizer.codes(x.float())  # the only rounding to fp32
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
    """The matrix multiplication of a linear or a patch embedding, float64, without bias."""
    flat = weight.codes.flatten(1)
    scale = torch.tensor(reads.scale) * weight.scale  # fp32, as engines multiply scales
    if weight.codes.dim() == 2:
        return _scaled(_sum(codes, flat.T), scale)
    assert isinstance(layer, nn.Conv2d)
    height, width = (size // step for size, step in zip(codes.shape[2:], layer.stride, strict=True))
    patches = functional.unfold(codes.float(), layer.kernel_size, stride=layer.stride)  # (N, in, P)
    output = _scaled(_sum(patches.transpose(1, 2).to(torch.int8), flat.T), scale)  # (N, P, out)
    return output.transpose(1, 2).reshape(len(output), -1, height, width)


def _sum(left: Tensor, right: Tensor) -> Tensor:
    """The exact matrix product of two code tensors: fp32 if it represents all partial sums exactly, else float64."""
    bound = int(left.int().abs().max()) * int(right.int().abs().max()) * left.shape[-1]
    dtype = torch.float32 if bound <= _FP32_INTEGERS else torch.float64
    return left.to(dtype) @ right.to(dtype)


def _scaled(sums: Tensor, scale: Tensor) -> Tensor:
    """Integers times an fp32 scale: rounded to fp32 before and after, then converted to float64."""
    return (sums.float() * scale).double()


def _joint(left: ActivationQuantizer, right: ActivationQuantizer) -> Tensor:
    return torch.tensor(left.scale) * torch.tensor(right.scale)


def as_fp32(value: float) -> float:
    """A number rounded to fp32, as an ONNX graph stores it."""
    return float(torch.tensor(value, dtype=torch.float32))
