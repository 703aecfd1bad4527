"""Compares the graph before its conversion to FP16 with the artifact in torch, layer by layer, with the same inputs.

The comparison runs in ONNX Runtime, as for the ONNX export. Only the patch embedding differs, which is a matrix
multiplication of rearranged pixels here. Every operator runs unoptimized, and sums are computed in float64: ONNX
Runtime's integer kernels saturate on CPUs without VNNI and its float32 sums round at every addition, neither of which
is a property of the graph. What remains is the rounding of `code * scale` and of the bias to fp32, a few times 6e-8, so
1e-6 of a layer's largest output is allowed, as for integer kernels in the ONNX export. A patch embedding that stays a
convolution is summed in float32, for which 1e-5 is allowed.

ONNX Runtime has no kernels for NVFP4, so layers with NVFP4 operands run node by node in ONNX's reference evaluator.
TensorRT's own operator is implemented for it here, from its documentation, in numpy with the casts of ml_dtypes: the
scale of a block is E4M3(amax / 6 / tensor_scale), a code is E2M1(x / (block_scale * tensor_scale)), both rounded to
nearest, ties to even, saturating. Codes must be equal. Outputs are compared with the exact result of the codes:
products of NVFP4 numbers are exact in fp32, and sums of so few bits stay within 1e-6 of the layer's largest output.
With float activations every term is rounded, and 1e-5 is allowed, as for other float sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from exporters.graph.between import evaluate
from exporters.graph.gates import layer_codes_gate, layer_error_gate, torch_errors
from exporters.graph.layers import DOMAIN, DYNAMIC_QUANTIZE, ExportedLayer
from exporters.graph.parity import (
    FLOAT_TOLERANCE,
    INTEGER_TOLERANCE,
    LayerParity,
    compare_layers,
    cut_layers,
    input_name,
    inputs_of,
    judge_layers,
    outputs_of,
)
from exporters.graph.trace import ProductKind
from fp8pipe.artifact import Gate
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.numerics.nvfp4 import BLOCK, BlockQuantizer

BLOCK_TOLERANCE: Final = 1e-6
_PATCHES = "/patches"


def typed_parity(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor
) -> list[LayerParity]:
    """Compare every layer without NVFP4 operands in ONNX Runtime with torch, given the same input.

    `model` is the float32 graph; `block_parity` compares the other layers. `pixels` (N, 3, H, W) must be normalized.
    """
    layers = [layer for layer in layers if not layer.blocks]
    taps = quantized.taps(pixels)
    inputs, outputs = inputs_of(quantized, layers, taps), outputs_of(layers, taps)
    for layer in layers:
        source = layer.operands[0].source
        if layer.kind is ProductKind.LINEAR and source is not None and str(source.name).endswith(_PATCHES):
            weight = quantized.model.get_submodule(layer.name).get_parameter("weight")
            kernel = tuple(weight.shape[2:])
            # `(N, C, H, W)` as `(N, patches, C * h * w)`: one row per patch, channel by channel.
            rows = functional.unfold(taps[layer.name]["input"], kernel, stride=kernel).transpose(1, 2)
            inputs[input_name(source)] = rows.contiguous().numpy()
            outputs[layer.label] = outputs[layer.label].flatten(2).transpose(1, 2)
    return compare_layers(model, layers, inputs, outputs, optimize=False)


def product_gates(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor
) -> list[Gate]:
    """Compare all layers of a float32 graph with torch, given the same input, and return the gates.

    `layers` are those of `model`, `quantized` is the model that the graph computes, and `pixels` (N, 3, H, W) must be
    normalized.
    """
    convolves = any(layer.kind is ProductKind.PATCH for layer in layers)
    report = typed_parity(model, layers, quantized, pixels)
    gates = typed_gates(report, FLOAT_TOLERANCE if convolves else INTEGER_TOLERANCE) if report else []
    return gates + block_gates(block_parity(model, layers, quantized, pixels))


def typed_gates(report: Sequence[LayerParity], tolerance: float = INTEGER_TOLERANCE) -> list[Gate]:
    """Gates on codes and outputs of all layers; pass `FLOAT_TOLERANCE` if some are not summed in float64."""
    errors = {layer.layer: layer.error for layer in report}
    codes = layer_codes_gate("activation codes differing", report)
    return [codes, layer_error_gate("layer error", errors, tolerance)]


def dynamic_quantize(x: Any, tensor_scale: Any) -> tuple[Any, Any]:
    """The output of TRT_FP4DynamicQuantize for blocks of 16 along the last axis of a float array `(..., n)`.

    Codes are `(..., n)` float4_e2m1fn, block scales `(..., n / 16)` float8_e4m3fn.
    """
    import ml_dtypes

    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    scale = np.float32(tensor_scale)
    wanted = np.abs(blocks).max(-1) / np.float32(6) / scale
    block_scales = np.minimum(wanted, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    steps = (block_scales.astype(np.float32) * scale)[..., None]
    units = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    return np.clip(units, -6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), block_scales


def block_parity(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor
) -> list[LayerParity]:
    """Compare every layer with an NVFP4 operand with torch, given the same input; empty if there is no such layer.

    The arguments are those of `product_gates`.
    """
    chosen = [layer for layer in layers if layer.blocks]
    if not chosen:
        return []
    taps = quantized.taps(pixels)
    inputs = inputs_of(quantized, chosen, taps)
    found = evaluate_graph(cut_layers(model, chosen, wide=True), inputs)
    return judge_layers(chosen, inputs, found, outputs_of(chosen, taps), lambda layer: _count(layer, inputs))


def block_gates(report: Sequence[LayerParity]) -> list[Gate]:
    """Gates on codes, and on outputs of the evaluator and of torch; none without NVFP4 layers."""
    if not report:
        return []
    errors = {layer.layer: layer.error for layer in report}
    # torch sums in float32, which is noticeable with float activations.
    in_torch = BLOCK_TOLERANCE if all(layer.codes for layer in report) else FLOAT_TOLERANCE
    return [
        layer_codes_gate("NVFP4 codes and block scales differing", report),
        layer_error_gate("NVFP4 layer error", errors, BLOCK_TOLERANCE),
        layer_error_gate("NVFP4 layer error in torch", torch_errors(report), in_torch),
    ]


def evaluate_graph(graph: Path | bytes, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a graph with NVFP4 operators, which ONNX Runtime lacks, in the reference evaluator; slow.

    `graph` is a file or its bytes; returns the outputs by name.
    """
    import onnx

    proto = onnx.load_model_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph)
    return evaluate(proto, inputs, [_operator()])


def _operator() -> Any:
    """TRT_FP4DynamicQuantize in the form the evaluator expects; the class name is the operator's name."""
    from onnx.reference.op_run import OpRun

    def run(self: Any, x: Any, tensor_scale: Any, **attributes: int) -> tuple[Any, Any]:
        if attributes.get("block_size") != BLOCK or attributes.get("axis") not in (-1, x.ndim - 1):
            raise ValueError(f"{DYNAMIC_QUANTIZE} of {attributes} is not a form that fp8pipe writes")
        return dynamic_quantize(x, tensor_scale)

    return type(DYNAMIC_QUANTIZE, (OpRun,), {"op_domain": DOMAIN, "_run": run})


def _count(layer: ExportedLayer, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Number of codes and block scales of a layer's activation, and how many of them differ between torch and numpy."""
    operand = layer.operands[0]
    if not isinstance(operand.quantizer, BlockQuantizer) or operand.source is None:
        return 0, 0
    x = inputs[input_name(operand.source)]
    codes, scales = dynamic_quantize(x, np.float32(operand.quantizer.tensor_scale))
    tensor = torch.from_numpy(x)
    ours = operand.quantizer.codes(tensor).numpy(), operand.quantizer.block_scales(tensor).view(torch.uint8).numpy()
    differing = sum(int((a != b.view(np.uint8)).sum()) for a, b in zip(ours, (codes, scales), strict=True))
    return codes.size + scales.size, differing
