"""Layer by layer, ONNX Runtime on the graph before it is halved against the artifact in torch.

The comparison is that of the ONNX export. Only the patch embedding differs, a product of rearranged pixels here. Every
operator runs as it stands, and products add up in float64: ONNX Runtime's integer kernels saturate on CPUs without VNNI
and its float32 sums round at every addition, neither of which is the graph's. What remains is the rounding of `code *
scale` and of the bias to fp32, a few times 6e-8, so 1e-6 of a layer's largest output is allowed, as for integer kernels
in the ONNX export. A patch embedding that stays a convolution is summed in float32: 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.graph.cut import input_name
from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import INTEGER_TOLERANCE, LayerParity, compare_layers, inputs_of, outputs_of
from exporters.graph.trace import ProductKind
from fp8pipe.artifact import Gate
from fp8pipe.models.vision.quantized import QuantizedVit

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["parity_gates", "typed_parity"]

_PATCHES = "/patches"


def typed_parity(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor
) -> list[LayerParity]:
    """Every product on the same input on both sides.

    Args:
        model: the float32 graph.
        layers: of it; those with NVFP4 operands are left out (`block_parity`).
        quantized: the artifact's model.
        pixels: `(N, 3, H, W)`, normalized.
    """
    layers = [layer for layer in layers if not layer.blocks]
    taps = quantized.taps(pixels)
    inputs, outputs = inputs_of(quantized, layers, taps), outputs_of(layers, taps)
    for layer in layers:
        source = layer.operands[0].source
        if layer.kind is ProductKind.LINEAR and source is not None and str(source.name).endswith(_PATCHES):
            weight = quantized.model.get_submodule(layer.name).get_parameter("weight")
            inputs[input_name(source)] = _unfolded(taps[layer.name]["input"], weight.shape[2:]).numpy()
            outputs[layer.label] = outputs[layer.label].flatten(2).transpose(1, 2)
    return compare_layers(model, layers, inputs, outputs, optimize=False)


def _unfolded(pixels: Tensor, kernel: Sequence[int]) -> Tensor:
    """`(N, C, H, W)` as `(N, patches, C * h * w)`: one row a patch, channel by channel."""
    return torch.nn.functional.unfold(pixels, tuple(kernel), stride=tuple(kernel)).transpose(1, 2).contiguous()


def parity_gates(report: Sequence[LayerParity], tolerance: float = INTEGER_TOLERANCE) -> list[Gate]:
    """Codes and outputs of all layers.

    Args:
        report: of layers whose products add up in float64.
        tolerance: `FLOAT_TOLERANCE` where some add up in float32.
    """
    codes, differing = sum(layer.codes for layer in report), sum(layer.differing_codes for layer in report)
    worst = max(report, key=lambda layer: layer.error if layer.error == layer.error else float("inf"))
    return [
        Gate(
            name="activation codes differing", value=differing, threshold=0, passed=differing == 0,
            detail=f"of {codes} in {len(report)} layers, each fed the same input",
        ),
        Gate(
            name="layer error", value=worst.error, threshold=tolerance, passed=worst.error <= tolerance,
            detail=f"against the exact result of the codes, over the layer's largest output; the worst: {worst.layer}",
        ),
    ]  # fmt: skip
